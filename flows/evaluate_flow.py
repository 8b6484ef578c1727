"""Compare models side by side on the same texts and prompts, each by nothing but its reference.

start ──┬─ measure ─┬── compare ── end
        └─ measure ─┘

python flows/evaluate_flow.py run                                       the latest model of TrainFlow
python flows/evaluate_flow.py run --models TrainFlow/17,TrainFlow/23    the models of two runs
python flows/evaluate_flow.py run --models TrainFlow/17 --text my.txt   on a text of yours

Without --text it is what the first model's training held out. Bits per byte compare across tokenizers.
"""

from metaflow import FlowSpec, IncludeFile, Parameter, card, current, model, step

from metaflow_extensions.hf import parameters as types
from metaflow_extensions.hf.card_components import show
from metaflow_extensions.hf.failures import explained
from metaflow_extensions.hf.trained import find_model, heldout_texts
from metaflow_hf.errors import SelectionError
from metaflow_hf.report import Compared, best_first, comparison_page, comparison_text, ruled


class EvaluateFlow(FlowSpec):
    """One branch for each model, one table for all."""

    models = Parameter(
        "models",
        type=types.name,
        default="TrainFlow",
        help="By commas: runs (TrainFlow/17), flows, keys of `metaflow hf models ls`.",
    )
    text = IncludeFile("text", required=False, help="A text file to measure on; default: held-out rows.")
    prompt = Parameter(
        "prompt", type=types.text, default="Return the ", help="The text that each model continues."
    )
    max_new_tokens = Parameter("max_new_tokens", default=48, help="Length of what they write, in tokens.")
    sequence_length = Parameter(
        "sequence_length", default=256, help="Tokens that a prediction may look back."
    )

    @step
    def start(self):
        """Find the references and the texts."""
        names = [name.strip() for name in self.models.split(",") if name.strip()]
        with explained():
            if not names:
                raise SelectionError(f"--models {self.models!r} names no model: give a run, a flow or a key.")
            self.references = {name: find_model(name) for name in names}
            self.texts = [self.text] if self.text else heldout_texts(next(iter(self.references.values())))
        self.names = list(self.references)
        self.next(self.measure, foreach="names")

    @model
    @step
    def measure(self):
        """One model: its figures on the texts, and what it writes."""
        from metaflow_hf.train import evaluate, generate

        directory = current.model.load(self.references[self.input])
        figures = evaluate(directory, self.texts, sequence_length=self.sequence_length)
        [written] = generate(directory, [self.prompt], max_new_tokens=self.max_new_tokens)
        self.compared = Compared(
            name=self.input,
            key=self.references[self.input]["key"],
            loss=figures.loss,
            perplexity=figures.perplexity,
            bits_per_byte=figures.bits_per_byte,
            tokens=figures.tokens,
            samples=((self.prompt, written),),
        )
        self.next(self.compare)

    @card(type="blank", id="comparison")
    @step
    def compare(self, inputs):
        """The table, best first; the card shows the texts too."""
        self.comparison = best_first(branch.compared for branch in inputs)
        show(current.card["comparison"], comparison_page(self.comparison))
        self.next(self.end)

    @step
    def end(self):
        """Show the table."""
        print(ruled(comparison_text(self.comparison)))


if __name__ == "__main__":
    EvaluateFlow()
