"""Every form of load=, saving, branches and a join; each claim is an assert."""

import os
from collections.abc import Mapping
from pathlib import Path

from metaflow import Config, FlowSpec, config_expr, current, huggingface_hub, model, step


def names(directory):
    return {p.relative_to(directory).as_posix() for p in Path(directory).rglob("*") if p.is_file()}


class FormsFlow(FlowSpec):
    config = Config(
        "config",
        default_value='{"load": {"base": ["gpt2", "./from_config"]}, "scope": "flow", '
        '"repo": "bert-base-uncased", "patterns": ["config.json", "*.txt"]}',
    )

    @huggingface_hub(
        load={
            "tokenizer": {"repo_id": "gpt2", "allow_patterns": "tokenizer*", "path": "aliased"},
            "same": "gpt2@main",
            "here": {"repo_id": "bert-base-uncased", "allow_patterns": ["LICENSE"], "path": "."},
        },
        cache_scope="global",
        verify="always",
        temp_dir_root="roots/hub",
    )
    @step
    def start(self):
        loaded = current.huggingface_hub.loaded
        assert isinstance(loaded, Mapping)
        assert set(loaded) == {"tokenizer", "same", "here"}
        assert loaded["here"] == "."
        assert Path("LICENSE").read_text() == "Apache License, Version 2.0\n"
        Path("LICENSE").write_text("edited")
        with current.huggingface_hub.load("bert-base-uncased", path=".", allow_patterns="LICENSE"):
            assert Path("LICENSE").read_text() != "edited"
        assert names(loaded["tokenizer"]) == {"tokenizer.json", "tokenizer_config.json"}
        assert loaded["tokenizer"] == "aliased"
        assert "model.safetensors" in names(loaded["same"])
        assert Path(loaded["same"]).parent == Path("roots/hub").absolute()
        assert loaded.info["same"]["commit_hash"] == loaded.info["tokenizer"]["commit_hash"]
        assert loaded.info["same"]["key"].startswith("snapshots/global/")
        with current.huggingface_hub.load("gpt2", allow_patterns="*.json") as path:
            assert "config.json" in names(path)
        assert not os.path.exists(path)
        one = current.huggingface_hub.hf_hub_download("gpt2", "config.json")
        assert one["num_files"] == 1
        many = current.huggingface_hub.download_many(["gpt2", "no/such"], max_workers=2)
        assert many["gpt2"]["status"] == "success"
        assert many["no/such"]["status"] == "error"
        assert "no/such" in many["no/such"]["error"]
        self.reference = many["gpt2"]["reference"]
        self.parts = ["a", "b"]
        self.next(self.train, foreach="parts")

    @model(
        load={"reference": None, "reference_key": None}, best_effort_load=True, temp_dir_root="roots/models"
    )
    @step
    def train(self):
        assert set(current.model.loaded) == {"reference"}
        given = current.model.loaded["reference"]
        assert Path(given).parent == Path("roots/models").absolute()
        Path(given, "weights.txt").write_text(self.input)
        Path(given, "config.json").write_text("edited")
        self.saved = current.model.save(given, label=f"part.{self.input}", metadata={"part": self.input})
        assert self.saved["type"] == "model"
        assert self.saved["pathspec"] == current.pathspec
        self.next(self.join)

    @model(load=[("reference", "./given")])
    @huggingface_hub(load=config_expr("config.load"), cache_scope=config_expr("config.scope"))
    @step
    def join(self, inputs):
        assert current.model.loaded["reference"] == "./given"
        assert names("from_config") == names("given")
        assert Path(current.model.loaded["reference"], "config.json").read_text() != "edited"
        assert current.huggingface_hub.loaded["gpt2"] == "./from_config"
        assert current.huggingface_hub.loaded.info["base"]["key"].startswith("snapshots/flow/FormsFlow/")
        for branch in inputs:
            directory = current.model.load(branch.saved)
            assert Path(directory, "weights.txt").read_text() == branch.input
        self.key = inputs[0].saved["key"]
        self.next(self.end)

    @huggingface_hub(
        load=[
            {"repo_id": config_expr("config.repo"), "allow_patterns": config_expr("config.patterns")},
            (config_expr("'gpt2@v1.0'"), config_expr("config.scope")),
        ]
    )
    @model(load="key")
    @step
    def end(self):
        assert "weights.txt" in names(current.model.loaded["key"])
        assert current.model.loaded.info["key"]["key"] == self.key
        loaded = current.huggingface_hub.loaded
        assert names(loaded["bert-base-uncased"]) == {"config.json", "vocab.txt"}
        assert loaded["gpt2@v1.0"] == "flow"
        assert loaded.info["gpt2@v1.0"]["revision"] == "v1.0"
        print("all forms work")


if __name__ == "__main__":
    FormsFlow()
