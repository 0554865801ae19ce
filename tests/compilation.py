"""How XLA compiles in tests: their programs run for milliseconds, and compile for seconds."""

# Without optimization, by the elder of its two ways to write kernels, in one piece: a third to
# three fifths of the time that the first of these flags takes alone.
QUICKLY = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)
