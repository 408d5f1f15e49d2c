"""Agreements of the ranks of a run, so that all of them do the same; a single process agrees with itself."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gpubatch import errors
from gpubatch.backend import Backend
from gpubatch.errors import ArgumentError, BackendUnavailableError, GpubatchError, RankError
from gpubatch.parallel import Ranks, first_of


class RanksMemoryError(MemoryError):
    """Memory ran out in a step, on one rank or several; all of them raise it."""


class Agreement:
    """The agreements of a run on ``ranks``; None is one process.

    All but the attributes are collective: every rank calls them at the same place.
    """

    def __init__(self, ranks: Ranks | None) -> None:
        self.ranks = ranks
        self.rank = 0 if ranks is None else ranks.rank
        self.size = 1 if ranks is None else ranks.size
        self.several = self.size > 1
        self._alike: BaseException | None = None  # what all ranks raise

    @property
    def first(self) -> bool:
        """Whether this rank writes files and shows the progress for all."""
        return self.rank == 0

    def any(self, mine: bool) -> bool:
        """Whether any rank says yes."""
        return bool(self.most(float(mine))) if self.several else mine

    def most(self, mine: float) -> float:
        """The largest number of any rank."""
        return mine if self.ranks is None else self.ranks.most([mine])[0]

    def share(self, value: Any) -> Any:
        """The value of rank 0, anything that JSON can hold."""
        return value if self.ranks is None else self.ranks.share(value)

    def all(self, mine: Any) -> list[Any]:
        """The values of all ranks, ordered by rank; anything that JSON can hold."""
        return [mine] if self.ranks is None else self.ranks.gather(mine)

    def words(self, mine: str | None) -> tuple[int, str] | None:
        """The message of the first rank that has one, and that rank; None if no rank has one."""
        return first_of(self.ranks if self.several else None, mine)

    def connect(self, backend: Backend) -> None:
        """Connect the ranks' GPUs, if they compute on some: before memory is planned, of which NCCL takes its share."""
        if self.ranks is not None and backend.name != "cpu":
            try:
                self.ranks.sum_(backend.zeros(1, np.float32))
            except Exception as error:  # such as two ranks on one GPU
                raise self.alike(error)  # noqa: B904

    # --- errors ---

    def alike(self, error: BaseException) -> BaseException:
        """An error that all ranks raise at this place, so that none has to tell the others. Not collective."""
        if self.several:
            self._alike = error
        return error

    @contextlib.contextmanager
    def phase(self) -> Iterator[None]:
        """A block that each rank runs by itself; if one fails, all raise at its end."""
        try:
            yield
        except Exception as error:
            if self.several:
                self.words(f"{type(error).__name__}: {error}")
                self._alike = error
            raise
        if self.several and (failed := self.words(None)) is not None:
            raise self.alike(error_of(*failed))

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """End the other ranks after an error of this one alone: they would wait for it for ever."""
        try:
            yield
        except BaseException as error:
            if self.ranks is not None and self.several:
                if not self._known(error):
                    self.ranks.abort(error)
                self.ranks.barrier()  # rank 0 may still be writing, and a program that ends, ends all ranks
            raise

    def _known(self, error: BaseException | None) -> bool:
        while error is not None and error is not self._alike:
            error = error.__cause__ or error.__context__
        return error is not None

    def same(self, what: Mapping[str, Any]) -> None:
        """Raise unless all ranks have the same values as rank 0, by name; anything that JSON can hold."""
        if self.ranks is None or not self.several:
            return
        mine = json.loads(json.dumps(dict(what)))
        theirs = self.share(mine)
        found = [name for name in mine if theirs.get(name) != mine[name]]
        of = [rank for rank, differs in enumerate(self.all(bool(found))) if differs]
        with self.phase():
            if found:
                name, before, here = difference(found[0], theirs[found[0]], mine[found[0]])
                which = f"rank {of[0]}" if len(of) == 1 else f"ranks {', '.join(map(str, of))}"
                have = "has" if len(of) == 1 else "have"
                raise ArgumentError(
                    f"all ranks must have the same {', '.join(found)}: {which} of {self.ranks.size} {have} others than "
                    f"rank 0; {name} is {before!r} on rank 0, {here!r} on rank {self.rank}"
                )


ALONE = Agreement(None)


def difference(name: str, theirs: Any, mine: Any) -> tuple[str, Any, Any]:
    """The name of the first entry in which two values differ, and both entries."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in [*theirs, *mine]:
            if theirs.get(key) != mine.get(key):
                return f"{name}'s {key}", theirs.get(key), mine.get(key)
    return name, theirs, mine


def error_of(rank: int, words: str) -> GpubatchError:
    """The error that the other ranks raise for an error of ``rank``: of the same class, if that is gpubatch's."""
    kind = getattr(errors, words.partition(":")[0], None)
    if isinstance(kind, type) and issubclass(kind, GpubatchError) and kind is not BackendUnavailableError:
        return kind(f"rank {rank}: {words.partition(': ')[2]}")
    return RankError(f"rank {rank}: {words}")
