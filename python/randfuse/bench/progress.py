"""Progress bar with an ETA; without tqdm one line per step, which says so."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from typing import Any


class Progress(AbstractContextManager):
    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.monotonic()
        try:
            from tqdm import tqdm
        except ImportError:
            print("bench: tqdm is not installed, progress is printed line by line; `pip install tqdm`", file=sys.stderr)
            self.bar: Any = None
        else:
            self.bar = tqdm(total=total, unit="group", file=sys.stderr, dynamic_ncols=True, smoothing=0)

    def note(self, text: str) -> None:
        """What is being done now."""
        if self.bar is None:
            spent = time.monotonic() - self.start
            left = f", about {spent / self.done * (self.total - self.done):.0f} s left" if self.done else ""
            print(f"[{self.done}/{self.total}{left}] {text}", file=sys.stderr)
        else:
            self.bar.set_postfix_str(text)

    def step(self) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.update()

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.close()
