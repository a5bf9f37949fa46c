"""Tensor rings as pure functions on cores: no modules, no state. The mathematics of arXiv 2501.08727."""

from trlora.ring.activations import apply_cores as apply_cores
from trlora.ring.contract import chain_from_cores as chain_from_cores
from trlora.ring.contract import delta_from_cores as delta_from_cores
from trlora.ring.contract import low_rank_from_cores as low_rank_from_cores
from trlora.ring.contract import matrix_from_cores as matrix_from_cores
from trlora.ring.contract import open_chain as open_chain
from trlora.ring.cost import apply_cores_flops as apply_cores_flops
from trlora.ring.cost import low_rank_flops as low_rank_flops
from trlora.ring.cost import matrix_from_cores_flops as matrix_from_cores_flops
from trlora.ring.cost import matrix_ring_parameters as matrix_ring_parameters
from trlora.ring.cost import ring_parameters as ring_parameters
from trlora.ring.init import identity_cores as identity_cores
from trlora.ring.init import residual_cores as residual_cores
from trlora.ring.modes import check_modes as check_modes
from trlora.ring.modes import index_of as index_of
from trlora.ring.modes import modes_of as modes_of
from trlora.ring.multiply import multiply_cores as multiply_cores
from trlora.ring.penalties import identity_penalty as identity_penalty
from trlora.ring.penalties import literal_orthogonal_penalty as literal_orthogonal_penalty
from trlora.ring.penalties import orthogonal_penalty as orthogonal_penalty
from trlora.ring.product import product_cores as product_cores
from trlora.ring.shapes import check_matrix_ring as check_matrix_ring
from trlora.ring.shapes import check_ranks as check_ranks
from trlora.ring.shapes import check_ring as check_ring
from trlora.ring.shapes import ranks_of as ranks_of
