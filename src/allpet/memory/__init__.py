"""Peak memory of a training, estimated without the device and without computing anything.

The system is built with tensors that have shapes but no contents (torch's ``FakeTensorMode``), and does what a
training does: steps with batches of the planned size and precision, the updates of optimiser and averaged weights, an
evaluation. Whatever lives is counted as it is made and freed; the peak is what torch's allocator would report.

Vocabulary. *Activations* are all that is neither weight, gradient, optimiser state nor average: the batch, what the
backward pass keeps, temporaries. GB are 1e9 bytes.

Estimates for CUDA follow its autocast, which keeps norms and softmax in float32 where the CPU's does not, and its fused
attention. Not counted: the CUDA context (about 0.5 GB), workspaces of convolutions and fragmentation, about 15 % + 1 GB
in all; the resident Python process; and, with several processes, the gradient buckets of DDP.
"""

from allpet.memory.budget import OverBudget, check_budget, largest_batch
from allpet.memory.estimate import GB, Estimate, Training, estimate
from allpet.memory.planned import geometry_of, training_of

__all__ = [
    "GB",
    "Estimate",
    "OverBudget",
    "Training",
    "check_budget",
    "estimate",
    "geometry_of",
    "largest_batch",
    "training_of",
]
