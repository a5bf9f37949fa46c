"""Adapters swapped at the speed of memory: the adapted weights of a running model written anew, in place."""

from trlora.swap.writer import PreparedAdapter as PreparedAdapter
from trlora.swap.writer import SwapReport as SwapReport
from trlora.swap.writer import WeightWriter as WeightWriter
