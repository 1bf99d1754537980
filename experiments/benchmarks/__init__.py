"""What `experiments.bench` measures: operators, generation and compilation. Importable, and open to
peers.

entries         an Entry is one way to compute a case: ours by name, or another library's
operators       the five operators as cases: sizes, inputs, how each is called
sweep           operators over length: checked, timed, judged
correctness     the gate in front of the clock
timing          round-robin timing
generation      time a generated token against context read
compile_time    compile time against depth
report          tables and verdicts    pictures   PNG    machine   what the figures were taken on
"""
