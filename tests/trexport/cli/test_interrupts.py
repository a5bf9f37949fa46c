"""Interrupts that a library swallows, and those that come while files are being removed."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

SWALLOWED = """
import time
from trexport.cli.interrupts import interruptible

class Deleted:
    def __del__(self):
        print("ready", flush=True)
        time.sleep(5)

try:
    with interruptible():
        try:
            {first}
        except BaseException:
            pass
        time.sleep(30)
        print("lost")
except KeyboardInterrupt:
    print("ended")
"""
CLEANING = """
import time
from trexport.cli.interrupts import interruptible

try:
    with interruptible():
        try:
            print("ready", flush=True)
            time.sleep(30)
        finally:
            time.sleep(1)
            print("cleaned")
except KeyboardInterrupt:
    print("ended")
time.sleep(0.5)
print("quiet")
"""


def interrupted(program: str, number: signal.Signals, times: int = 1) -> list[str]:
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(times):
            process.send_signal(number)
        return process.communicate(timeout=60)[0].splitlines()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("first", ["print('ready', flush=True); time.sleep(30)", "Deleted()"], ids=["except", "del"])
def test_an_interrupt_that_is_swallowed_comes_again(first: str, number: signal.Signals) -> None:
    assert interrupted(SWALLOWED.format(first=first), number) == ["ended"]


def test_cleaning_up_is_not_interrupted_again() -> None:
    assert interrupted(CLEANING, signal.SIGINT, times=2) == ["cleaned", "ended", "quiet"]
