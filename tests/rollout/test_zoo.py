"""Twenty architectures of transformers that the other tests do not know; `make zoo` tries all of them."""

from __future__ import annotations

import pytest
from zoo.trial import try_family

EXACT = (
    *("arcee", "bart", "biogpt", "bitnet", "codegen", "falcon", "glm4", "gpt_oss"),
    *("granitemoehybrid", "hrm_text", "jetmoe", "minicpm3", "mixtral", "phi3", "zaya"),
)
REFUSED = {
    "deepseek_v32": "its cache keeps DynamicIndexedLayer",
    "doge": "differ from those of one pass",
    "openai-gpt": "keep their past outside of the cache",
    "recurrent_gemma": "recurrent_gemma",
    "zamba": "begin each token chunk anew instead of from their states",
}


@pytest.mark.parametrize("family", EXACT)
def test_an_architecture_is_exact(family):
    trial = try_family(family)
    assert trial.outcome == "exact", trial.detail


@pytest.mark.parametrize("family", REFUSED)
def test_an_architecture_is_refused_by_name(family):
    trial = try_family(family)
    assert trial.outcome == "refused", trial.detail
    assert trial.detail.startswith(family)
    assert REFUSED[family] in trial.detail
