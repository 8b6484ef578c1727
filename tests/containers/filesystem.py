"""A root file system of its own for commands: this machine's below, what they write above."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What a base image does not have.
HIDDEN = ("/tmp", "/root", "/home")


def mounting_is_permitted(place: Path) -> bool:
    """Whether overlays can be mounted here."""
    try:
        Root(place / "probe").close()
    except subprocess.CalledProcessError:
        return False
    return True


class Root:
    """A root directory, on top of another's or of this machine's; unmounted by ``close``."""

    def __init__(
        self,
        place: Path,
        below: "Root | None" = None,
        *,
        hide: Sequence[Path] = (),
        share: Mapping[str, Path] | None = None,
    ) -> None:
        """``hide`` are directories that are empty here, ``share`` places where directories of this machine are seen; both
        hold for what is put on top.
        """
        self._mounted = ExitStack()
        self._hide: Sequence[Path] = below._hide if below else hide
        self._share: Mapping[str, Path] = below._share if below else share or {}
        self.path = place / "root"
        for name in ("written", "work", "root"):
            (place / name).mkdir(parents=True)
        options = (
            f"lowerdir={below.path if below else '/'},upperdir={place / 'written'},workdir={place / 'work'}"
        )
        try:
            self._mount("-t", "overlay", "overlay", "-o", options, target="/")
            for hidden in (*HIDDEN, *map(str, self._hide)):
                if self.of(hidden).is_dir():
                    self._mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", target=hidden)
            self._mount("--bind", "/proc", target="/proc")
            self._mount("--rbind", "/dev", target="/dev")
            # This Python stands for that of the image, wherever it lies.
            for target, source in {sys.base_prefix: Path(sys.base_prefix), **self._share}.items():
                self.bind(source, target)
        except subprocess.CalledProcessError:
            self.close()
            raise
        if below is None:
            self._forget_people()
            python = Path(sys.base_prefix, "bin", f"python{sys.version_info[0]}.{sys.version_info[1]}")
            command = self.of("/usr/local/bin/python")
            command.unlink(missing_ok=True)
            command.write_text(f'#!/bin/sh\nexec {python} "$@"\n')
            command.chmod(0o755)

    def of(self, path: str | Path, *more: str) -> Path:
        """Where a path of this file system is seen from outside."""
        return self.path.joinpath(str(path).lstrip("/"), *more)

    def bind(self, source: Path, target: str) -> None:
        """Makes a directory of this machine visible at ``target``."""
        self._mount("--bind", str(source), target=target)

    def run(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        directory: str = "/",
        user: str = "0",
        timeout: float = 500,
    ) -> str:
        """What a command printed, both streams in one. Raises ``AssertionError`` with it when the command fails."""
        home = {} if user != "0" else {"HOME": "/root"}
        change = f'cd "{directory}" && exec "$@"'
        process = subprocess.Popen(
            ["chroot", f"--userspec={user}:{user}", self.path, "/bin/sh", "-c", change, "sh", *arguments],
            env={"PATH": PATH, **home, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            # As a container ends: with everything that it has started.
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            output += f"\n(not done after {timeout} s)"
        assert process.returncode == 0, f"{' '.join(arguments)} ended with {process.returncode}:\n{output}"
        return output

    def copy(self, source: Path, target: str, owner: str = "") -> None:
        """Copies as COPY does: a directory's content into a directory, a file to a name or into a directory."""
        place = self.of(target)
        if source.is_dir() or target.endswith("/"):
            place.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-a", f"{source}/." if source.is_dir() else source, place], check=True)
        given = owner or "0:0"
        self.run(["chown", "-R", "--no-dereference", given, self._name(target, source)], {})

    def close(self) -> None:
        self._mounted.close()

    def _forget_people(self) -> None:
        """A base image has the system's own users alone."""
        for name in ("passwd", "group"):
            file = self.of("/etc", name)
            kept = [
                line for line in file.read_text().splitlines() if not 1000 <= int(line.split(":")[2]) < 60_000
            ]
            file.write_text("\n".join([*kept, ""]))

    def _name(self, target: str, source: Path) -> str:
        return f"{target}{source.name}" if target.endswith("/") and not source.is_dir() else target

    def _mount(self, *options: str, target: str) -> None:
        place = self.of(target)
        place.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", *options, str(place)], check=True, capture_output=True)
        self._mounted.callback(subprocess.run, ["umount", "-l", "-R", str(place)], check=True)


def copy_of_volume(root: Root, target: str, volume: Path) -> None:
    """Binds a named volume; a new one begins with what the image has there."""
    if not volume.exists():
        seen = root.of(target)
        if seen.is_dir():
            shutil.copytree(seen, volume, symlinks=True)
            stat = seen.stat()
            for path in (volume, *volume.rglob("*")):
                os.chown(path, stat.st_uid, stat.st_gid, follow_symlinks=False)
        else:
            volume.mkdir(parents=True)
    root.bind(volume, target)
