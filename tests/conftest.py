import os

import torch

# several pytest workers with all of torch's threads each would only wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
