"""What a method is written with, as a promise: these names stay.

    from jpeft import extend as x

docs/write-a-method.md shows a whole method.  A leaf says of each of its arrays which
axes of the weight it has, and gives its formula; a transform says which weights get
it.  That is enough for a model in any form, for checkpoints, meshes and merging.  What
is cheaper than the whole weight is a rule: what an equation does (a verb), and a kind
of leaf.
"""

from jpeft.adapt.equations import Add as Add
from jpeft.adapt.equations import Change as Change
from jpeft.adapt.equations import Consume as Consume
from jpeft.adapt.equations import Contract as Contract
from jpeft.adapt.equations import Convolve as Convolve
from jpeft.adapt.equations import Join as Join
from jpeft.adapt.equations import LookUp as LookUp
from jpeft.adapt.equations import Move as Move
from jpeft.adapt.equations import Negate as Negate
from jpeft.adapt.equations import Product as Product
from jpeft.adapt.equations import Route as Route
from jpeft.adapt.equations import Scale as Scale
from jpeft.adapt.equations import Sum as Sum
from jpeft.adapt.equations import align as align
from jpeft.adapt.interpreter import Interpreter as Interpreter
from jpeft.adapt.interpreter import acts as acts
from jpeft.adapt.interpreter import acts_as as acts_as
from jpeft.adapt.interpreter import contracts as contracts
from jpeft.adapt.labels import Labelled as Labelled
from jpeft.adapt.labels import contract as contract
from jpeft.adapt.labels import factor_of as factor_of
from jpeft.attach import LeafMethod as LeafMethod
from jpeft.attach import Ranked as Ranked
from jpeft.attach import check_rank as check_rank
from jpeft.checks import Count as Count
from jpeft.checks import CountOrZero as CountOrZero
from jpeft.checks import Floating as Floating
from jpeft.checks import Positive as Positive
from jpeft.checks import Rate as Rate
from jpeft.checks import one_of as one_of
from jpeft.leaf import AdaptedLeaf as AdaptedLeaf
from jpeft.leaf import adapted_leaf as adapted_leaf
from jpeft.leaf import frozen as frozen
from jpeft.leaf import is_leaf as is_leaf
from jpeft.leaf import shapes_beside as shapes_beside
from jpeft.leaf import static as static
from jpeft.leaf import trainable as trainable
from jpeft.leaf import transient as transient
from jpeft.leaves.draw import drawn as drawn
from jpeft.leaves.draw import filled as filled
from jpeft.leaves.first_factors import draw_a as draw_a
from jpeft.leaves.low_rank import ActsAsLowRank as ActsAsLowRank
from jpeft.leaves.low_rank import LowRank as LowRank
from jpeft.leaves.low_rank import low_rank_product as low_rank_product
from jpeft.leaves.scaled import ScaledInput as ScaledInput
from jpeft.leaves.scaled import ScaledOutput as ScaledOutput
from jpeft.leaves.value import MadeInUse as MadeInUse
from jpeft.transform import Recipe as Recipe
from jpeft.transform import Transform as Transform
from jpeft.transform import method as method
from jpeft.tree.layout import BIAS as BIAS
from jpeft.tree.layout import CONV as CONV
from jpeft.tree.layout import EMBEDDING as EMBEDDING
from jpeft.tree.layout import LINEAR as LINEAR
from jpeft.tree.layout import MATRIX as MATRIX
from jpeft.tree.layout import NORM as NORM
from jpeft.tree.layout import LeafUse as LeafUse
from jpeft.tree.where import Where as Where
