"""Everything that a store holds, read without the library."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3


class Directory(Mapping[str, bytes]):
    """A store on local disk."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __getitem__(self, key: str) -> bytes:
        return (self._root / key).read_bytes()

    def __iter__(self) -> Iterator[str]:
        for path in self._root.rglob("*"):
            # A "#" ends the name of what is being written.
            if path.is_file() and "#" not in path.name:
                yield path.relative_to(self._root).as_posix()

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Bucket(Mapping[str, bytes]):
    """A store in S3."""

    def __init__(self, uri: str, endpoint: str) -> None:
        parts = urlsplit(uri)
        self._bucket, self._prefix = parts.netloc, parts.path.strip("/") + "/"
        self._client: Any = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
        )

    def __getitem__(self, key: str) -> bytes:
        answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key)
        return bytes(answer["Body"].read())

    def __iter__(self) -> Iterator[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix
        )
        for page in pages:
            for item in page.get("Contents", []):
                yield item["Key"].removeprefix(self._prefix)

    def __len__(self) -> int:
        return sum(1 for _ in self)
