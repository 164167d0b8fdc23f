"""Beyond one device, on torch.distributed: losses whose classes are spread over processes."""

from fusedact.distributed.heads import VocabParallelLinearCrossEntropyLoss as VocabParallelLinearCrossEntropyLoss
from fusedact.distributed.heads import vocab_parallel_linear_cross_entropy as vocab_parallel_linear_cross_entropy
from fusedact.distributed.loss_parallel import loss_parallel as loss_parallel
from fusedact.distributed.losses import VocabParallelCrossEntropyLoss as VocabParallelCrossEntropyLoss
from fusedact.distributed.losses import vocab_parallel_cross_entropy as vocab_parallel_cross_entropy
from fusedact.distributed.sweeps import fit_many as fit_many
