"""Schemes applied: the Linears of a plain `transformers` model in few bits, weights and activations.

    record = apply(model, "w4a8+gptq+online", calibration=tokens_NT, seed=0)

Scope is the claim of `bitalloc.families`: what a plan may touch is quantised, everything else stays as it is, each with
its reason (`scope`). Of Mamba2 that is in_proj and out_proj of every mixer; conv1d, A_log, D, dt_bias, norms,
embedding and head stay, and so does the recurrent state.

Arithmetic is simulated: codes are rounded, then computed with as floats. It says what a scheme costs in quality,
nothing of its speed. `@torchao` and `@compressed-tensors` are those libraries' own, the second a simulation too.

Shapes: O outputs, I inputs of a matrix W_OI, G groups of inputs, T tokens, S tokens of a sample, N windows.
"""

from bitalloc.scheme import Scheme
from bitalloc.schemes.application import Record, apply
from bitalloc.schemes.calibration import Calibration
from bitalloc.schemes.linear import QuantLinear, calls
from bitalloc.schemes.matrices import Matrix, Scope, Unit, scope
