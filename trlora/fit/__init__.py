"""Fitting: an adapter that takes a base weight near a fine-tuned one, `‖W* − diag(gain)·(W0·T + Δ)‖_F` small.

Everything is in float64 and a layer by itself. `fit_layer` takes any registered members.
"""

from trlora.fit.allocate import Point as Point
from trlora.fit.allocate import within_budget as within_budget
from trlora.fit.allocate import within_error as within_error
from trlora.fit.curve import Search as Search
from trlora.fit.curve import fit_curve as fit_curve
from trlora.fit.layer import FitOptions as FitOptions
from trlora.fit.layer import LayerFit as LayerFit
from trlora.fit.layer import fit_layer as fit_layer
from trlora.fit.sizes import ladder as ladder
