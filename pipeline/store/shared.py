"""A store in a folder of this machine, in front of an object store that machines share."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from pipeline.store import locks, manifest, processes, uses
from pipeline.store.locks import Lock, Locks
from pipeline.store.manifest import Damaged
from pipeline.store.objects import Away
from pipeline.store.remote import Key, Remote
from pipeline.store.step import Step
from pipeline.store.store import LOCKS, SHARES, Artifact, Store, discard, placed
from pipeline.store.uses import PATIENCE
from stages.errors import InputError

log = logging.getLogger(__name__)
RECENT = 10.0  # seconds for which a list of what the remote holds is used again
PAUSE = 300.0  # seconds for which a remote that has not answered is not asked
FETCHING = ".fetching"
REMOTE = "-remote-"  # in a path that stands for files of the remote
T = TypeVar("T")


class SharedStore(Store):
    """Artifacts are made and read in the folder `cache`. What it lacks is downloaded from the remote, and
    what is made is uploaded, except the artifacts of the stages `unshared`.

    A remote that does not answer is a warning: work goes on with the cache, and what it makes is
    uploaded by the next run that uses it, or by `push`.
    """

    def __init__(
        self,
        cache: Path,
        remote: Remote,
        runtime: Mapping[str, Any] | None = None,
        between: Locks | None = None,
        unshared: Collection[str] = (),
    ) -> None:
        """`between` are the locks between machines; those of the processes of this one are files."""
        super().__init__(cache, runtime)
        self.remote = remote
        self.unshared = frozenset(unshared)
        self._between = between or locks.none()
        self._listed: set[Key] = set()
        self._listed_at = self._away_until = float("-inf")
        self._bad: dict[Key, bytes] = {}  # manifests of damaged artifacts, which may be replaced

    @property
    def name(self) -> str:
        return self.remote.objects.address

    def reach(self) -> None:
        if self.remote.objects.absent:
            raise InputError(f"no store at {self.name}; give its folder or address with --store")

    def check(self) -> None:
        assert self.remote.objects.takes

    def build(self, step: Step, make: Callable[[Path], None]) -> Artifact:
        artifact = super().build(step, make)
        if not artifact.hit or self._listed_there((artifact.stage, artifact.key)):
            return artifact
        return self._uploaded(artifact)

    def load(self, stage: str, key: str, full: bool = False) -> Artifact | None:
        try:
            if (artifact := super().load(stage, key, full)) is not None:
                return artifact
        except Damaged as fault:
            if not self._fetched((stage, key), replace=True):
                raise
            log.warning("%s; replaced by that of %s", fault, self.name)
            return super().load(stage, key, full)
        return super().load(stage, key, full) if self._fetched((stage, key)) else None

    def holds(self, stage: str, key: str) -> bool:
        return super().holds(stage, key) or self._listed_there((stage, key))

    def folder(self, stage: str, key: str) -> Path:
        if not (folder := super().folder(stage, key)).is_dir():
            self.load(stage, key)
        return folder

    def folders(self) -> list[Path]:
        """Where the artifacts of both are in the cache, or would be.

        Raises Away: with half a list `gc` would delete what the other half needs."""
        self._listed, self._listed_at = self.remote.keys(), time.monotonic()
        there = {self.root.joinpath(*key) for key in self._listed}
        return sorted({*super().folders(), *there})

    def records(self, paths: Sequence[Path]) -> dict[Path, dict[str, Any] | None]:
        known = super().records([path for path in paths if path.is_dir()])
        absent = [path for path in paths if path not in known]
        texts = self.remote.texts([_key(path) for path in absent])  # likewise
        known |= {path: _parsed(text) for path, text in zip(absent, texts, strict=True)}
        return {path: known.get(path) for path in paths}

    def verify(self, path: Path) -> None:
        """The same of the copy in the cache and of that in the remote, which is downloaded for it."""
        if path.is_dir():
            super().verify(path)
        key = _key(path)
        if (text := self.remote.text(key)) is not None:
            with self._fetching(key) as temporary:
                try:
                    self.remote.download(key, text, temporary)
                except (Damaged, FileNotFoundError) as fault:
                    absent = isinstance(fault, FileNotFoundError)
                    what = "a file is missing" if absent else str(fault)
                    raise Damaged(f"{what}, in {self.name}") from None

    @contextmanager
    def using(self, keys: Iterable[str]) -> Iterator[None]:
        keys = [*keys]
        with super().using(keys), ExitStack() as there:
            also = uses.using(self.remote.objects, keys)
            self._asked(lambda: there.enter_context(also), None)
            yield

    def used(self) -> set[str]:
        return super().used() | uses.used(self.remote.objects)  # raises Away likewise

    def orphans(self) -> list[Path]:
        """Temporary folders of killed builders and of downloads; and paths that stand for the files of
        uploads which came to no end."""
        left = super().orphans()
        for folder in self.root.glob(f"{FETCHING}/*/.tmp-*"):
            try:
                with self._fetch_lock(_key(folder)).acquire(timeout=0):
                    left.append(folder)
            except Timeout:
                continue
        old: dict[tuple[Key, str], float] = self._asked(self.remote.leftovers, {})
        for (stage, key), checksum in (place for place, age in old.items() if age > PATIENCE):
            left.append(self.root / stage / f".tmp-{key}{REMOTE}{checksum}")
        return left

    def push(self) -> list[Path]:
        """Upload what the cache alone holds, and say what that was; raises Away."""
        there = self.remote.keys()
        kept = self.unshared | {SHARES}  # units of what is merged by now
        mine = [path for path in super().folders() if path.parent.name not in kept]
        absent = [path for path in mine if _key(path) not in there]
        for path in absent:
            try:
                manifest.verified(path)
            except Damaged as fault:
                raise InputError(
                    f"{path} is damaged ({fault}); remove it with `store gc`"
                ) from None
            self.remote.upload(path)
        return absent

    def _delete(self, path: Path) -> None:
        stage, key = _key(path)
        if REMOTE in path.name:
            self.remote.remove_leftover((stage, key), path.name.partition(REMOTE)[2])
            return
        if not path.name.startswith("."):
            if stage == SHARES:  # of work that goes on without the remote; `gc` deletes what stays
                self._asked(lambda: self.remote.remove((stage, key)), None)
            else:
                self.remote.remove((stage, key))
            self._listed.discard((stage, key))
        super()._delete(path)

    def forget(self, step: Step) -> None:
        super().forget(step)
        self._fetch_file((step.stage, step.key())).unlink(missing_ok=True)

    def _make(
        self, step: Step, key: str, make: Callable[[Path], None], spent: float = 0.0
    ) -> Artifact:
        artifact = super()._make(step, key, make, spent)
        return artifact if artifact.hit else self._uploaded(artifact)

    def _lock(self, stage: str, key: str) -> Lock:
        here = super()._lock(stage, key)
        if stage in self.unshared or self._away:
            return here
        between = locks.IfThere(lambda: self._between.of(f"{stage}-{key}"))
        return locks.Chained((here, between))

    def _uploaded(self, artifact: Artifact) -> Artifact:
        """Uploads an artifact; the one that stands then, which is another's where that was first."""
        key = artifact.stage, artifact.key
        if artifact.stage in self.unshared:
            return artifact
        over = self._bad.pop(key, None)
        sent = self._asked(lambda: self.remote.upload(artifact.path, over), None)
        if sent is None:
            return artifact
        self._listed.add(key)
        if not sent and self._fetched(key, replace=True):
            log.info("%s %s: another machine has built it too; its artifact is used", *key)
            return super().load(*key) or artifact
        return artifact

    def _fetched(self, key: Key, replace: bool = False) -> bool:
        """Whether the remote has an artifact, which is in the cache then; with `replace` in the place of
        what is there. Raises Damaged where the remote's is not whole."""
        if key[0] in self.unshared:
            return False
        return self._asked(lambda: self._fetch(key, replace), False)

    def _fetch(self, key: Key, replace: bool) -> bool:
        path = self.root.joinpath(*key)
        text = self.remote.text(key)
        while text is not None:
            with self._fetching(key) as temporary:
                if path.is_dir() and not replace:
                    return True  # another process of this machine has downloaded it
                try:
                    self.remote.download(key, text, temporary)
                except (Damaged, FileNotFoundError) as fault:
                    seen, text = text, self.remote.text(key)
                    if text != seen:
                        continue  # it was deleted or replaced meanwhile
                    self._bad[key] = seen
                    where = "/".join((self.name, *key))
                    if isinstance(fault, FileNotFoundError):
                        fault = Damaged("a file of it is missing")
                    raise Damaged(f"artifact {where} is damaged: {fault}") from None
                if path.is_dir():
                    discard(path)
                path.parent.mkdir(parents=True, exist_ok=True)
                placed(temporary, path)
                return True
        return False

    @contextmanager
    def _fetching(self, key: Key) -> Iterator[Path]:
        """An empty folder for a download, one for each artifact at a time on this machine."""
        folder = self.root / FETCHING / key[0] / f".tmp-{key[1]}-{processes.file_name()}"
        with self._fetch_lock(key):
            folder.mkdir(parents=True)
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def _fetch_lock(self, key: Key) -> FileLock:
        (self.root / LOCKS).mkdir(parents=True, exist_ok=True)
        return FileLock(self._fetch_file(key))

    def _fetch_file(self, key: Key) -> Path:
        return self.root / LOCKS / f"{key[0]}-{key[1]}.fetch.lock"

    def _listed_there(self, key: Key) -> bool:
        """Whether the remote holds an artifact, as it was listed seconds ago at most, or longer where it
        did then."""
        if key not in self._listed and time.monotonic() - self._listed_at > RECENT:
            self._listed = self._asked(self.remote.keys, self._listed)
            self._listed_at = time.monotonic()
        return key in self._listed

    @property
    def _away(self) -> bool:
        return time.monotonic() < self._away_until

    def _asked(self, ask: Callable[[], T], otherwise: T) -> T:
        """What the remote answers; where it does not, a warning, and it is left alone for a while."""
        if self._away:
            return otherwise
        try:
            return ask()
        except Away as fault:
            self._away_until = time.monotonic() + PAUSE
            log.warning(
                "%s. Going on with %s for %.0f minutes; what is made meanwhile is uploaded by the next "
                "run that uses it, or by `python -m pipeline store push`",
                fault,
                self.root,
                PAUSE / 60,
            )
            return otherwise


def _key(path: Path) -> Key:
    """Stage and key of the folder of an artifact, or of a temporary one."""
    return path.parent.name, path.name.removeprefix(".tmp-").partition("-")[0]


def _parsed(text: bytes | None) -> dict[str, Any] | None:
    try:
        return None if text is None else manifest.parse(text)
    except Damaged:
        return None
