"""Whether a final lineage trained anything: one that did not is a failure, whatever its rounds say."""

from metaflow_hf.errors import TrainingIncomplete
from metaflow_hf.train.lineage import ClosedRound
from metaflow_hf.train.ranges import Positions
from metaflow_hf.train.records import Spec


def check_trained(spec: Spec, newest: ClosedRound) -> None:
    """Raises ``TrainingIncomplete`` for a final round whose weights no token was trained into.

    The message names the settings that can leave a dataset without tokens, with the lineage's values.
    """
    if not newest.manifest.final or newest.manifest.tokens > 0:
        return
    skipped = len(Positions.from_ranges(newest.manifest.skipped))
    if skipped:
        reason = (
            f"{skipped} of {spec.num_positions} positions failed and were skipped (rounds.on_failure: skip): find the "
            "reason in the log of the workers"
        )
    else:
        data = spec.hyperparameters.get("data", {})
        reason = (
            "no row left a token to learn. Look at data.text_column, data.loss_on "
            f"({data.get('loss_on')}), data.long_documents ({data.get('long_documents')}, with data.sequence_length "
            f"{data.get('sequence_length')}), data.on_bad_row, and what is held out"
        )
    raise TrainingIncomplete(
        f"the lineage {spec.lineage!r} is final, but trained 0 tokens: {reason}. `metaflow hf preview` shows the tokens that a "
        "configuration trains. Start another lineage."
    )
