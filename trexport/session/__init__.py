"""Serving one model with many adapters: load, switch, mix."""

from trexport.session.forms import fed_tensors as fed_tensors
from trexport.session.session import Session as Session
