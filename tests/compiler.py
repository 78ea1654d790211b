"""How programs are compiled in tests, most of whose time is the compiler's: plainly, in a third of the time."""

# The emitters of fused loops are the newer ones, whose machine code takes twice as long to make.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
