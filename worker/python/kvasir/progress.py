"""A progress bar on stderr for anything that lasts; quiet lines where stderr is no terminal."""

import sys
import time


class Bar:
    """Bar("prefill", 32768, "tokens"): call bar(n_done, total) as work goes on, then close()."""

    def __init__(self, what, total, unit="", out=None):
        self.what, self.total, self.unit = what, max(1, total), unit
        self.out = out or sys.stderr
        self.tty = self.out.isatty()
        self.start = self.drawn = time.monotonic()
        self.first = None  # (time, n) of the first report, so that what was reused does not count

    def __call__(self, n, total=None):
        now = time.monotonic()
        self.total = total or self.total
        if self.first is None:
            self.first = (now, n)
        every = 0.2 if self.tty else 15.0
        if now - self.drawn >= every or n >= self.total:
            self.drawn = now
            self._draw(n, now)

    def _rate(self, n, now):
        t0, n0 = self.first
        return (n - n0) / (now - t0) if n > n0 and now > t0 else 0.0

    def _draw(self, n, now):
        rate, share = self._rate(n, now), min(1.0, n / self.total)
        left = f"{(self.total - n) / rate:4.0f} s left" if rate > 0 else ""
        cells = round(28 * share)
        text = (
            f"{self.what} [{'#' * cells}{'.' * (28 - cells)}] {100 * share:3.0f}% "
            f"{n}/{self.total} {self.unit} {rate:.0f}/s {left}"
        )
        self.out.write(f"\r{text:<100.100}" if self.tty else text.rstrip() + "\n")
        self.out.flush()

    def close(self):
        """Ends the line."""
        if self.tty:
            self.out.write("\n")
            self.out.flush()
