"""The parts that methods share; no method imports another one.

inner: optimisers of y, and the bases InnerLoop, SingleLoop and GradientDescent
unrolling: derivatives through the steps of the inner loop (with `higher`: by that library)
linear: solvers for H v = b by products alone;   implicit: H, and the estimate f_x - J v
neumann: random chains for the adjoint;   recursion: momentum of differences
differences: J v by differences of first derivatives, random directions
"""
