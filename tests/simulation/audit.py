"""What must hold of a lineage, told from the store's content alone by code that shares nothing with the library."""

import hashlib
import json
import struct
from collections.abc import Mapping

Manifest = dict


class Auditor:
    """Checks every round as it appears, and that none changes or goes away afterwards."""

    def __init__(self, num_positions: int) -> None:
        self._num_positions = num_positions
        self.digests: list[str] = []
        self._seen: list[bytes] = []
        self.manifests: list[Manifest] = []

    def look(self, objects: Mapping[str, bytes]) -> None:
        """Looks at the store as it is at this moment."""
        keys = sorted(key for key in objects if key.startswith("rounds/"))
        assert keys == [f"rounds/{number:010d}.json" for number in range(len(keys))], f"a gap in {keys}"
        assert len(keys) >= len(self._seen), "a closed round went away"
        for number, key in enumerate(keys):
            content = objects[key]
            if number < len(self._seen):
                assert content == self._seen[number], f"round {number} changed after it was closed"
                continue
            self._check(number, json.loads(content), objects)
            self._seen.append(content)
            self.digests.append(hashlib.sha256(content).hexdigest())

    @property
    def newest(self) -> Manifest:
        return self.manifests[-1]

    def _check(self, number: int, manifest: Manifest, objects: Mapping[str, bytes]) -> None:
        assert manifest["round"] == number
        done, skipped = expand(manifest["done"]), expand(manifest["skipped"])
        assert not done & skipped, "a position is both done and skipped"
        if number:
            self._check_step(self.manifests[-1], manifest, done)
        self.check_weights(number, manifest, objects)
        assert manifest["final"] == (len(done) + len(skipped) == self._num_positions)
        self.manifests.append(manifest)

    def check_weights(self, number: int, manifest: Manifest, objects: Mapping[str, bytes]) -> None:
        """The weights are made of exactly what was accepted: of a trainer that counts, a one for all that is done."""
        done = expand(manifest["done"])
        expected = [float(position in done) for position in range(self._num_positions)]
        counts = list(read_tensor(objects[manifest["weights"]["key"]], "counts"))
        assert counts == expected, f"round {number}: weights {counts} for done {sorted(done)}"

    def _check_step(self, parent: Manifest, manifest: Manifest, done: set[int]) -> None:
        assert manifest["parent"] == self.digests[-1], "the chain is broken"
        assert not parent["final"], "a final round has a successor"
        assert expand(parent["skipped"]) <= expand(manifest["skipped"])
        before, added = expand(parent["done"]), set()
        for item in manifest["accepted"]:
            positions = expand(item["positions"])
            assert not positions & added, "two contributions cover one position"
            assert not positions & before, "a position went in twice"
            added |= positions
        assert done == before | added, "done is not what the contributions cover"
        assert manifest["tokens"] == parent["tokens"] + sum(item["tokens"] for item in manifest["accepted"])
        empty = 0 if manifest["accepted"] else parent["empty_rounds"] + 1
        assert manifest["empty_rounds"] == empty


def expand(ranges: list) -> set[int]:
    """The positions in half-open ranges."""
    return {position for start, stop in ranges for position in range(start, stop)}


def read_tensor(content: bytes, name: str) -> tuple[float, ...]:
    """The values of one fp32 vector of a safetensors file, read by the format's specification."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    start, stop = header[name]["data_offsets"]
    assert header[name]["dtype"] == "F32"
    assert header[name]["shape"] == [(stop - start) // 4]
    return struct.unpack(f"<{(stop - start) // 4}f", content[8 + length + start : 8 + length + stop])
