"""Errors of huggingface_hub's names, caught as its users catch them, while a token is in use."""

import subprocess

from huggingface_hub import errors
from metaflow import FlowSpec, current, huggingface_hub, step

from metaflow_hf.errors import HubUnavailable, IntegrityError

CASES = [
    ({"repo_id": "no/such"}, errors.RepositoryNotFoundError),
    ({"repo_id": "acme/private-model"}, errors.RepositoryNotFoundError),
    ({"repo_id": "gpt2", "revision": "v9"}, errors.RevisionNotFoundError),
    ({"repo_id": "acme/gated-model", "token": False, "force_download": True}, errors.GatedRepoError),
    ({"repo_id": "gpt2", "filename": "none.json"}, errors.EntryNotFoundError),
    # A hub that fails for as long as it is asked.
    ({"repo_id": "microsoft/phi-2"}, HubUnavailable),
    ({"repo_id": "distilbert-base-uncased", "filename": "config.json"}, ConnectionError),
    ({"repo_id": "bert-base-uncased", "filename": "config.json"}, IntegrityError),
]


class CaughtFlow(FlowSpec):
    @huggingface_hub(load={"repo_id": "acme/gated-model", "token": "hf_reader"})
    @step
    def start(self):
        for arguments, kind in CASES:
            given = dict(arguments)
            repo_id, filename = given.pop("repo_id"), given.pop("filename", None)
            try:
                if filename is None:
                    current.huggingface_hub.snapshot_download(repo_id, **given)
                else:
                    current.huggingface_hub.hf_hub_download(repo_id, filename, **given)
            except kind as error:
                print(f"caught {type(error).__name__}: {error}")
        seen = subprocess.run(
            ["ps", "axwwe", "-o", "args"], capture_output=True, text=True, check=True
        ).stdout
        print(f"processes show the token: {'hf_' + 'reader' in seen}, this flow: {'caught_flow.py' in seen}")
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    CaughtFlow()
