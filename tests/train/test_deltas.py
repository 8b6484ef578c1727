"""Files of tensors, encodings of contributions, and the outer step."""

import gc
import hashlib
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from metaflow_hf.errors import IntegrityError
from metaflow_hf.train.delta import (
    BLOCK,
    SLAB,
    check_delta,
    decode_delta,
    delta_layouts,
    dequantise,
    encode_delta,
    quantise,
)
from metaflow_hf.train.outer import average, mean_change, nesterov
from metaflow_hf.train.tensors import Layout, TensorReader, TensorWriter, write_all, write_tensors


def some_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "layers.0.weight": torch.randn(33, 70, generator=generator),
        "layers.0.bias": torch.randn(70, generator=generator),
        "a": torch.randn((), generator=generator),
        "z": torch.randn(3, 5, 7, generator=generator),
    }


def test_files_are_what_safetensors_reads(tmp_path):
    tensors = {
        **some_tensors(),
        "half": torch.randn(5, 3).bfloat16(),
        "small": torch.arange(7, dtype=torch.int8),
        "transposed": torch.randn(4, 6).t(),
    }
    digest = write_all(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert digest.size == (tmp_path / "x.safetensors").stat().st_size


def test_equal_tensors_give_equal_bytes_in_any_order(tmp_path):
    tensors = some_tensors()
    first = write_all(tmp_path / "x", tensors)
    second = write_all(tmp_path / "y", dict(reversed(tensors.items())))
    assert first == second
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_a_writer_refuses_what_is_not_due(tmp_path):
    writer = TensorWriter(tmp_path / "x", {"a": Layout((2,)), "b": Layout((1,))})
    with pytest.raises(ValueError, match="not the one that is due"):
        writer.add("b", torch.zeros(1))
    with pytest.raises(ValueError, match="differs from its layout"):
        writer.add("a", torch.zeros(3))
    writer.add("a", torch.zeros(2))
    with pytest.raises(ValueError, match="was not given"):
        writer.close()


def test_a_damaged_file_is_not_read(tmp_path):
    write_all(tmp_path / "x", some_tensors())
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-3])
    with pytest.raises(IntegrityError, match="not a readable"):
        TensorReader(tmp_path / "x")


def test_a_tensor_may_be_given_in_pieces(tmp_path):
    tensors = {**some_tensors(), "empty": torch.zeros(0, 3)}
    layouts = {name: Layout(tuple(tensor.shape)) for name, tensor in tensors.items()}
    with TensorWriter(tmp_path / "pieces", layouts) as writer:
        for name in sorted(tensors):
            for piece in tensors[name].reshape(-1).split(100):
                writer.extend(name, piece)
        digest = writer.close()
    assert digest == write_all(tmp_path / "whole", tensors)
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()
    assert hashlib.sha256((tmp_path / "pieces").read_bytes()).hexdigest() == digest.sha256
    with (
        TensorWriter(tmp_path / "x", {"a": Layout((4,))}) as writer,
        pytest.raises(ValueError, match="differs from its layout"),
    ):
        writer.extend("a", torch.zeros(3))
        writer.extend("a", torch.zeros(2))


def test_a_stream_that_breaks_leaves_no_file_open(tmp_path):
    def breaks():
        yield "a", torch.zeros(2)
        raise RuntimeError("no more")

    # A file that nobody closed is a ResourceWarning, and warnings are errors.
    with pytest.raises(RuntimeError, match="no more"):
        write_tensors(tmp_path / "x", {"a": Layout((2,)), "b": Layout((1,))}, breaks())
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sha256")]


def test_int8_of_several_slabs_is_that_of_each_block():
    values = torch.randn(2 * SLAB + 3 * BLOCK + 17, generator=torch.Generator().manual_seed(0))
    base = torch.randn(len(values), generator=torch.Generator().manual_seed(1))
    quantised, scales = quantise(values, base)
    change = values - base
    for block in (0, 1, SLAB // BLOCK - 1, SLAB // BLOCK, 2 * SLAB // BLOCK + 2, len(scales) - 1):
        part = change[block * BLOCK : (block + 1) * BLOCK]
        scale = part.abs().max() / 127
        assert scales[block] == scale
        found = quantised[block * BLOCK : (block + 1) * BLOCK]
        assert torch.equal(found, (part / scale).round().to(torch.int8))
    whole = dequantise(quantised, scales)
    assert torch.equal(whole, quantised.float() * scales.repeat_interleave(BLOCK)[: len(values)])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.floats(1e-12, 1e6), st.integers(0, 100))
def test_int8_is_off_by_half_a_step_at_most(size, scale, seed):
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale
    quantised, scales = quantise(values)
    assert quantised.dtype == torch.int8
    assert quantised.shape == values.shape
    assert len(scales) == -(-size // BLOCK)
    error = (dequantise(quantised, scales) - values).abs()
    for block, part in enumerate(values.split(BLOCK)):
        bound = part.abs().max() / 254 * 1.0001
        assert bool((error[block * BLOCK : (block + 1) * BLOCK] <= bound).all())


def test_int8_keeps_zeros_and_shows_what_is_not_finite():
    zeros = torch.zeros(5, 5)
    assert torch.equal(dequantise(*quantise(zeros)), zeros)
    for bad in (float("nan"), float("inf")):
        values = torch.ones(2 * BLOCK)
        values[3] = bad
        scales = quantise(values)[1]
        assert not bool(torch.isfinite(scales[0]))
        assert bool(torch.isfinite(scales[1]))


@pytest.mark.parametrize("encoding", ["weights", "fp32", "int8/1024"])
def test_a_contribution_is_read_back(tmp_path, encoding):
    base, weights = some_tensors(0), some_tensors(1)
    write_all(tmp_path / "base", base)
    shapes = {name: tuple(tensor.shape) for name, tensor in base.items()}
    with TensorReader(tmp_path / "base") as reader:
        tensors = encode_delta(weights, reader, encoding)
        write_tensors(tmp_path / "delta", delta_layouts(shapes, encoding), tensors)
        with TensorReader(tmp_path / "delta") as delta:
            check_delta(delta, reader, encoding)
            for name, value in base.items():
                change = decode_delta(delta, name, value, encoding)
                wanted = weights[name] - value
                tolerance = float(wanted.abs().max()) / 250 if encoding == "int8/1024" else 0.0
                torch.testing.assert_close(change, wanted, rtol=0, atol=tolerance)


def test_a_contribution_with_other_tensors_is_refused(tmp_path):
    base = some_tensors()
    write_all(tmp_path / "base", base)
    save_file({name: base[name] for name in ("a", "z")}, tmp_path / "few")
    save_file({**base, "a": torch.zeros(2)}, tmp_path / "shape")
    with TensorReader(tmp_path / "base") as reader:
        for name, message in (("few", "missing or unknown"), ("shape", "has shape")):
            with TensorReader(tmp_path / name) as delta, pytest.raises(IntegrityError, match=message):
                check_delta(delta, reader, "fp32")


def test_the_outer_step_is_sgd_with_nesterov_momentum():
    weights = torch.randn(50, generator=torch.Generator().manual_seed(0))
    parameter = torch.nn.Parameter(weights.clone())
    oracle = torch.optim.SGD([parameter], lr=0.7, momentum=0.6, nesterov=True)
    step, momentum = nesterov(0.7, 0.6), None
    for round_number in range(5):
        generator = torch.Generator().manual_seed(round_number + 1)
        changes = [torch.randn(50, generator=generator) for _ in range(3)]
        tokens = [10, 30, 60]
        parameter.grad = -mean_change(changes, tokens)
        oracle.step()
        weights, momentum = step(weights, changes, tokens, momentum)
        torch.testing.assert_close(weights, parameter.detach(), rtol=1e-6, atol=1e-6)


def test_the_mean_counts_tokens():
    changes = [torch.tensor([1.0]), torch.tensor([5.0])]
    assert mean_change(changes, [30, 10]).item() == 2.0
    assert average(torch.tensor([10.0]), changes, [30, 10], None)[0].item() == 12.0
