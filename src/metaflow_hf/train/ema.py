"""The exponential moving average (EMA) of a lineage's weights over its rounds, by tokens: it lags behind training, and
leaves out its noise.

After a round of n tokens it is ``average + (1 - 0.5 ** (n / half_life)) * (weights - average)``, so the length of rounds
does not matter. It begins as the first round's weights. Averaging models some way apart does what averaging after each
step does (Kaddour, "Stop Wasting My Time!", 2022; Sanyal et al., 2023).
"""

from collections.abc import Callable

from metaflow_hf.train.delta import slabs
from metaflow_hf.train.files import PayloadFiles
from metaflow_hf.train.lineage import Lineage
from metaflow_hf.train.records import Payload, Round
from metaflow_hf.train.tensors import Layout, TensorReader, TensorWriter


def next_average(
    lineage: Lineage,
    files: PayloadFiles,
    before: Round,
    weights: Payload,
    tokens: int,
    *,
    half_life: int,
    progress: Callable[[], None],
) -> Payload:
    """Stores the average of the round after ``before``, which has these ``weights`` and trained ``tokens``."""
    if before.ema is None:
        return weights
    share = 1.0 - 0.5 ** (tokens / half_life)
    draft = files.draft("ema")
    with TensorReader(files.fetch(before.ema)) as old, TensorReader(files.fetch(weights)) as new:
        layouts = {name: Layout(new.shape(name)) for name in new.names}
        with TensorWriter(draft, layouts) as writer:
            for name in sorted(new.names):
                average = old[name].reshape(-1)
                for start, values in slabs(new[name]):
                    writer.extend(name, average[start : start + len(values)].lerp(values, share))
                progress()
            digest = writer.close()
    return lineage.upload_payload(files.adopt(draft, digest), "ema", before.round + 1, digest)
