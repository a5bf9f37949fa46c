"""Serving one model with many adapters: load, switch, mix."""

from trexport.session.session import Session as Session
from trexport.session.sources import fed_tensors as fed_tensors
