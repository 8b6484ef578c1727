"""What comes of a lineage: an exported model, its quality, its texts."""

import itertools
import json
import math

import msgspec
import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from metaflow_hf.config import ModelConfig
from metaflow_hf.data import BlockManager, encode_examples, process_raw_dataset_to_blocks
from metaflow_hf.data.batches import make_batches
from metaflow_hf.errors import ConfigError, TrainingIncomplete, UnsupportedModelError
from metaflow_hf.events import RoundClosed
from metaflow_hf.store import open_store
from metaflow_hf.store.models import load_directory
from metaflow_hf.train import evaluate, evaluation, export_lineage, generate
from metaflow_hf.train.heldout import heldout_rows, key_of
from metaflow_hf.train.lineage import Lineage
from metaflow_hf.train.models import load_model, load_tokenizer

TASK = {"flow": "F", "run": "1", "step": "join", "task": "7"}


@pytest.fixture(autouse=True)
def _own_node_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METAFLOW_HF_CACHE", str(tmp_path / "node-cache"))


@pytest.fixture
def export(training, tmp_path):
    def run(**changes):
        return export_lineage(
            store=training.store,
            models=open_store(tmp_path / "models"),
            model_dir=training.model_dir,
            config=training.config,
            **{**TASK, **changes},
        )

    return run


def test_the_moving_average_of_all_rounds_is_a_model_too(training, export, tmp_path):
    training.start(rounds={"ema_half_life": 500, "seconds": 0.01})
    training.work()
    store = training.store
    rounds = [json.loads(store.get(info.key)) for info in store.list("rounds")]
    average = None
    for before, after in itertools.pairwise(rounds):
        weights = safetensors.torch.load(store.get(after["weights"]["key"]))
        share = 1 - 0.5 ** ((after["tokens"] - before["tokens"]) / 500)
        average = (
            {name: (1 - share) * average[name] + share * weights[name] for name in weights}
            if average
            else weights
        )
    averaged = export(ema=True)
    assert averaged.label == "model-ema"
    assert export(ema=True) == averaged
    last = export()
    assert last.digest != averaged.digest
    found = AutoModelForCausalLM.from_pretrained(load(tmp_path, averaged), dtype=torch.float32).state_dict()
    for name, values in average.items():
        torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-7)


def test_an_average_that_was_not_kept_cannot_be_exported(training, export, tmp_path):
    training.start(rounds={"max_tokens": 100})
    training.work()
    with pytest.raises(ConfigError, match=r"rounds\.ema_half_life was not set"):
        export(ema=True)
    with pytest.raises(ValueError, match="one at a time"):
        export(ema=True, best=True)
    # As where every position failed and was skipped: what began is what is averaged.
    training.config = training.config.replace(rounds={"ema_half_life": 10})
    averaged, last = (
        (load(tmp_path, export(ema=ema)) / "model.safetensors").read_bytes() for ema in (True, False)
    )
    assert averaged == last


def load(tmp_path, reference):
    return load_directory(open_store(tmp_path / "models"), reference, tmp_path / "out")


def test_the_export_is_the_final_round_and_the_same_however_often_it_is_asked_for(training, export, tmp_path):
    training.start()
    training.work()
    reference = export()
    assert export(task="8") == reference
    assert reference.metadata["positions_done"] == 18
    assert reference.metadata["lineage"] == "test"
    directory = load(tmp_path, reference)
    model = AutoModelForCausalLM.from_pretrained(directory)
    newest = max((tmp_path / "store/rounds").glob("*.json"))
    weights = json.loads(newest.read_text())["weights"]["key"]
    from safetensors.torch import load_file

    for name, value in load_file(tmp_path / "store" / weights).items():
        assert torch.equal(model.get_parameter(name), value)
    assert AutoTokenizer.from_pretrained(directory)("a list")["input_ids"]


def test_an_unfinished_lineage_is_not_exported(training, export):
    training.start()
    with pytest.raises(TrainingIncomplete, match="0 of 18 positions are done"):
        export()


def test_a_training_of_no_tokens_is_no_success(training, export):
    training.start(data={"long_documents": "drop", "sequence_length": 4})
    said = "is final, but trained 0 tokens: no row left a token to learn.*data.long_documents .drop, with data.sequence_length 4."
    for work in (training.work, training.work, export):
        with pytest.raises(TrainingIncomplete, match=said):
            work()


def test_a_training_whose_every_position_was_skipped_is_no_success(training, export, monkeypatch):
    training.start(rounds={"on_failure": "skip", "max_failures": 1})
    lineage = Lineage(training.store)
    first = lineage.newest().manifest
    skipped = msgspec.structs.replace(
        first, round=1, skipped=[(0, 18)], final=True, parent=lineage.newest().digest
    )
    lineage.create_round(skipped)
    for work in (training.work, export):
        with pytest.raises(
            TrainingIncomplete, match=r"18 of 18 positions failed and were skipped .rounds.on_failure: skip"
        ):
            work()


def test_adapters_are_trained_and_folded_into_the_model(training, export, tmp_path):
    training.start(model={"lora": {"rank": 4}}, rounds={"max_tokens": 1500})
    training.work()
    size = max(path.stat().st_size for path in (tmp_path / "store/weights").rglob("*.safetensors"))
    assert size < (training.model_dir / "model.safetensors").stat().st_size / 2
    directory = load(tmp_path, export())
    before = AutoModelForCausalLM.from_pretrained(training.model_dir)
    after = AutoModelForCausalLM.from_pretrained(directory)
    assert before.state_dict().keys() == after.state_dict().keys()
    assert not torch.equal(
        before.model.layers[0].mlp.up_proj.weight, after.model.layers[0].mlp.up_proj.weight
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_adapters_by_themselves_load_in_plain_peft(training, export, tmp_path):
    import peft

    lora = {"rank": 4, "alpha": 64.0, "save": "adapter"}
    training.start(model={"repo_id": "org/tiny", "lora": lora}, rounds={"max_tokens": 1500})
    training.work()
    reference = export(base_model={"commit_hash": "c" * 40, "key": "snapshots/tiny"})
    assert reference.metadata["adapter_of"] == "snapshots/tiny"
    directory = load(tmp_path, reference)
    about = json.loads((directory / "adapter_config.json").read_text())
    assert (about["base_model_name_or_path"], about["revision"]) == ("org/tiny", "c" * 40)
    assert not (directory / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(training.model_dir)
    ids = torch.tensor([AutoTokenizer.from_pretrained(directory)("the name of a list")["input_ids"]])
    plain = base(input_ids=ids).logits
    adapted = peft.PeftModel.from_pretrained(base, str(directory)).eval()(input_ids=ids).logits
    assert not torch.allclose(adapted, plain, atol=1e-2)
    # What is merged is the same model, and our own evaluation finds it.
    training.config = training.config.replace(model={"lora": {**lora, "save": "merged"}})
    merged = load_directory(open_store(tmp_path / "models"), export(), tmp_path / "merged")
    folded = AutoModelForCausalLM.from_pretrained(merged)(input_ids=ids).logits
    torch.testing.assert_close(folded, adapted, rtol=1e-4, atol=1e-4)
    ours = load_model(directory, training.config.model, base_dir=training.model_dir)
    torch.testing.assert_close(ours(input_ids=ids).logits, adapted, rtol=1e-4, atol=1e-4)
    with pytest.raises(UnsupportedModelError, match="is an adapter of org/tiny, not a model"):
        evaluate(directory, ["the name of a list"])


def test_the_export_has_the_wanted_dtype(training, export, tmp_path):
    training.start(model={"dtype": "bfloat16"}, rounds={"max_tokens": 500})
    training.work()
    directory = load(tmp_path, export())
    assert AutoModelForCausalLM.from_pretrained(directory, dtype="auto").dtype == torch.bfloat16


def test_training_lowers_the_loss_on_held_out_text(training, export, tmp_path):
    training.start(data={"epochs": 2, "evaluation_dataset": None})
    losses = []
    training.work(
        on_event=lambda event: losses.append(event.loss) if isinstance(event, RoundClosed) else None
    )
    with training.blocks() as blocks:
        texts = [row.value for row in heldout_rows(blocks, training.config)]
    before = evaluate(training.model_dir, texts, sequence_length=32)
    after = evaluate(load(tmp_path, export()), texts, sequence_length=32)
    assert after.loss < before.loss - 1
    assert (before.tokens, before.bytes) == (after.tokens, after.bytes)
    assert losses[-1] < losses[0]


def test_held_out_rows_are_chosen_by_what_they_say(training, dataset_dir):
    training.config = training.config.replace(data={"evaluation_dataset": None})
    with training.blocks() as blocks:
        rows = heldout_rows(blocks, training.config)
        few = heldout_rows(blocks, training.config.replace(evaluation={"max_samples": 3}))
    files = sorted((dataset_dir / "blocks").glob("*.jsonl"))
    texts = [[json.loads(line)["text"] for line in file.read_text().splitlines()] for file in files]
    expected = sorted((text for block in texts for text in block), key=key_of)[:10]
    expected = [text for block in texts for text in block if text in expected]
    assert [row.value for row in rows] == expected
    assert all(texts[row.block_id][row.row] == row.value for row in rows)
    assert len(few) == 3
    assert {row.block_id for row in few} == {0, 1, 2}, "from everywhere"


def test_each_text_is_measured_by_itself_too(model_dir):
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    texts = ["the list of a file", "", "it is the name of the value", "von der Größe"]
    found = evaluate(model, texts, tokenizer, sequence_length=7)
    assert [one.index for one in found.documents] == [0, 2, 3]
    assert sum(one.tokens for one in found.documents) == found.tokens
    total = sum(one.loss * one.tokens for one in found.documents)
    assert total / found.tokens == pytest.approx(found.loss)
    alone = evaluate(model, texts[:1], tokenizer, sequence_length=7)
    assert alone.loss == pytest.approx(found.documents[0].loss, rel=1e-5)
    assert found.worst(2) == sorted(found.documents, key=lambda one: -one.loss)[:2]


@pytest.mark.parametrize("length", [7, 16, 1000])
def test_every_token_is_predicted_once_from_its_window(model_dir, length):
    texts = ["the list of a file", "", "it is the name", "von der Größe"]
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    stream = [tokenizer.eos_token_id]
    for text in filter(None, texts):
        stream += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    total = 0.0
    for target in range(1, len(stream)):
        window = stream[(target - 1) // length * length : target]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([window])).logits[0, -1]
        total -= float(torch.log_softmax(logits.double(), -1)[stream[target]])
    found = evaluate(model, texts, tokenizer, sequence_length=length)
    assert found.tokens == len(stream) - 1
    assert found.bytes == sum(len(text.encode()) for text in texts)
    assert found.loss == pytest.approx(total / found.tokens, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / found.bytes, rel=1e-5)


def test_nothing_to_predict_is_an_error(model_dir):
    with pytest.raises(ConfigError, match="nothing to predict"):
        evaluate(model_dir, ["", ""])


def test_the_same_seed_gives_the_same_text(model_dir):
    prompts = ["the list", ""]
    first = generate(model_dir, prompts, max_new_tokens=12, seed=3)
    torch.rand(5)
    assert generate(model_dir, prompts, max_new_tokens=12, seed=3) == first
    assert generate(model_dir, prompts, max_new_tokens=12, seed=4) != first
    assert len(first) == 2
    assert not first[0].startswith("the list")


def test_temperature_zero_takes_the_most_likely_tokens(model_dir):
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = tokenizer("the list")["input_ids"]
    start = len(ids)
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    expected = tokenizer.decode(ids[start:], skip_special_tokens=True)
    found = generate(model, ["the list"], tokenizer, max_new_tokens=6, temperature=0)[0]
    assert found == expected


def test_a_token_before_each_document_is_context_and_not_predicted(model_dir):
    from tokenizers.processors import TemplateProcessing

    plain = load_tokenizer(model_dir)
    tokenizer = load_tokenizer(model_dir)
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(5)
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, 5)]
    )
    texts = ["the value of a file", "the name"]
    assert tokenizer(texts)["input_ids"][0][0] == 5
    model = load_model(model_dir, ModelConfig())
    measured = evaluate(model, texts, tokenizer, sequence_length=64)
    # By hand, as it is trained: [begin, text, end] for each text, the begin never counted.
    rows = [[5, *ids, plain.eos_token_id] for ids in plain(texts)["input_ids"]]
    stream = torch.tensor([[token for row in rows for token in row]])
    with torch.no_grad():
        logits = model(input_ids=stream[:, :-1]).logits[0].double()
    targets = stream[0, 1:]
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    keep = torch.ones_like(targets, dtype=torch.bool)
    keep[len(rows[0]) - 1] = False
    assert measured.tokens == int(keep.sum())
    assert measured.loss == pytest.approx(float(losses[keep].mean()), rel=1e-5)


CHATS = [
    [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "the list of a file"},
        {"role": "assistant", "content": "the name of a file"},
        {"role": "user", "content": "is it the value"},
        {"role": "assistant", "content": "größe"},
    ],
    [{"role": "user", "content": "the value"}, {"role": "assistant", "content": "of a list"}],
]
SAID = ["the name of a file<|im_end|>\n", "größe<|im_end|>\n", "of a list<|im_end|>\n"]


def test_of_conversations_is_counted_what_training_counts(model_dir):
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    found = evaluate(model, CHATS, tokenizer, sequence_length=1000)
    assert found.bytes == sum(len(text.encode()) for text in SAID)
    # What training counts, in one sequence, as the trainer computes it.
    [batch] = make_batches(
        encode_examples([{"messages": chat} for chat in CHATS], tokenizer), sequence_length=1000
    )
    assert found.tokens == batch.num_tokens
    assert tokenizer.decode(batch.labels[batch.labels != -100]) == "".join(
        [*SAID[:2], tokenizer.eos_token, SAID[2], tokenizer.eos_token]
    )
    with torch.no_grad():
        loss = float(model(**batch.to_mapping()).loss)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    everything = evaluate(model, CHATS, tokenizer, sequence_length=1000, loss_on="all")
    assert everything.tokens > found.tokens
    assert everything.bytes > found.bytes


@pytest.mark.parametrize("packing", [True, False, "isolated"])
@pytest.mark.parametrize("sequence_length", [24, 1000])
def test_texts_are_measured_as_they_are_packed_in_training(model_dir, packing, sequence_length):
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    texts = [
        "the name of a file",
        "the value of a list is not the name of it, and a file is no list",
        "größe",
    ]
    found = evaluate(model, texts, tokenizer, sequence_length=sequence_length, packing=packing)
    rows = [{"text": text} for text in texts]
    total, losses = 0, 0.0
    for example in [encode_examples([row], tokenizer) for row in rows] if packing is not True else []:
        # Each text by itself, from its own beginning, in windows that predict every later token once.
        ids = torch.tensor([example[0].input_ids])
        for start in range(0, ids.shape[1] - 1, sequence_length):
            window = ids[:, start : start + sequence_length + 1]
            with torch.no_grad():
                logits = model(input_ids=window[:, :-1]).logits[0].double()
            losses += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
            total += window.shape[1] - 1
    if packing is True:
        [batch] = make_batches(encode_examples(rows, tokenizer), sequence_length=1000)
        assert found.tokens == batch.num_tokens + 1, "the first token too, behind an end of text"
    else:
        assert found.tokens == total
        assert found.loss == pytest.approx(losses / total, rel=1e-5)
    assert {document.index for document in found.documents} == {0, 1, 2}


@pytest.mark.parametrize(("text", "num_bytes"), [("hello", 4), ("élan", 4), ("日本語", 8)])
def test_without_an_end_of_text_token_the_first_token_is_not_counted_whatever_its_bytes(text, num_bytes):
    letters = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    plain = Tokenizer(BPE(letters, []))
    plain.pre_tokenizer, plain.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=8, n_layer=1, n_head=1, n_positions=16))
    found = evaluate(model, [text], tokenizer, sequence_length=8)
    assert (found.tokens, found.bytes) == (num_bytes, num_bytes)


def test_held_out_conversations_need_no_tokenizer(training, tmp_path):
    training.config = training.config.replace(data={"evaluation_dataset": None})
    chats = [[{"role": "assistant", "content": f"once {number}"}] for number in range(40)]
    rows = "".join(json.dumps({"messages": chat, "n": n}) + "\n" for n, chat in enumerate([*chats, *chats]))
    (tmp_path / "raw.jsonl").write_text(rows)
    process_raw_dataset_to_blocks(tmp_path / "raw.jsonl", tmp_path / "blocks", "chats")
    with BlockManager(tmp_path / "blocks") as blocks:
        found = heldout_rows(blocks, training.config)
        assert found
        assert all(row.value.messages == chats[row.row] for row in found), "a copy is no other row"


@pytest.mark.parametrize("prompt", ["the list", "the list of a file is the name of it " * 9, ""])
def test_texts_end_with_the_positions_that_a_model_knows(model_dir, prompt):
    """Learned ones end there: after the last is an error, on a GPU one that leaves it of no use."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    shape = {"vocab_size": 300, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(**shape, eos_token_id=None))
    # It never ends a text by itself.
    model.lm_head.register_forward_hook(
        lambda module, inputs, logits: logits.index_fill(-1, torch.tensor(tokenizer.all_special_ids), -1e9)
    )
    last: list[int] = []
    model.transformer.wpe.register_forward_hook(
        lambda module, inputs, output: last.append(int(inputs[0].max()))
    )
    generate(model, [prompt], tokenizer, max_new_tokens=64, temperature=0)
    assert last[-1] == 30, "the last of 32 tokens is read by nobody"


def test_held_out_rows_are_found_in_a_dataset_of_many_small_blocks(training, tmp_path):
    texts = [f"text {number}" for number in range(100)]
    # Its block is none of the 32 that are looked at first.
    lowest = min(texts, key=key_of)
    assert lowest == "text 1"
    (tmp_path / "raw.txt").write_text("\n".join(texts))
    process_raw_dataset_to_blocks(tmp_path / "raw.txt", tmp_path / "blocks", "rows", block_size=1)
    config = training.config.replace(data={"heldout_samples": 1, "evaluation_dataset": None})
    with BlockManager(tmp_path / "blocks") as blocks:
        assert [row.value for row in heldout_rows(blocks, config)] == ["text 1"]


@pytest.mark.parametrize("limit", [1, 300 * 4 * 3, 300 * 4 * 40])
@pytest.mark.parametrize("can_roll_out", [True, False])
def test_the_figure_does_not_depend_on_how_many_logits_there_are_at_once(
    model_dir, monkeypatch, caplog, limit, can_roll_out
):
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    texts = ["the list of a file is the name of it " * 9, "von der Größe"]
    expected = evaluate(model, texts, tokenizer, sequence_length=16)
    monkeypatch.setattr(evaluation, "LOGITS_BYTES", limit)
    if not can_roll_out:
        refused = UnsupportedModelError("as if")

        def refuse(model, *, exact):
            raise refused

        monkeypatch.setattr("metaflow_hf.rollout.probe.require", refuse)
    made = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: made.append(
            output.shape[0] * output.shape[1] if output.dim() == 3 else len(output)
        )
    )
    found = evaluate(model, texts, tokenizer, sequence_length=16)
    assert (found.tokens, found.bytes) == (expected.tokens, expected.bytes)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    if limit >= 300 * 4 * 16:
        assert max(made) == 32, "two windows at once"
    elif not can_roll_out:
        assert max(made) == 16
        assert caplog.text.count("are made at once: as if") == 1


def test_long_windows_are_rolled_out(model_dir, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    texts = ["the list of a file is the name of it " * 20]
    expected = evaluate(model, texts, tokenizer, sequence_length=100)
    monkeypatch.setattr(evaluation, "LOGITS_BYTES", 300 * 4 * 30)
    lengths = []
    model.model.layers[0].register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    found = evaluate(model, texts, tokenizer, sequence_length=100)
    assert max(lengths) == 30
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
