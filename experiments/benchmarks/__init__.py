"""The measurements of `experiments.bench`: operators, generation and compilation. Importable, and
open to peers.

entries         a BenchmarkEntry is one way to compute a problem: ours, or another library's
operators       the operators as they are called here: published shapes, kinds of call, inputs
sweep           operators over length: checked, timed, judged
correctness     the gate in front of the clock
timing          round-robin timing
generation      time per generated token against the context read
compile_time    compile time against depth
tune            chunk and block sizes
peers           other libraries: gpu_peers, cpu_peers
static_cost     TPU kernels as compiled; static_triton: Triton kernels
report          tables and verdicts    pictures   PNG    machine   what the figures were taken on
"""
