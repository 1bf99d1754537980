"""Without Triton its tests are left out: pip install -e '.[triton]'."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("triton") else ["test_triton.py"]
