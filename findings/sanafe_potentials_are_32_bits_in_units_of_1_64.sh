#!/usr/bin/env bash
# sanafe 2.2.9 (SANA-FE): its leaky_integrate_fire neuron turns its potential into a C int of 1/64 at every step.
# So with real weights a potential loses up to 1/64 towards zero a step, which a leak_decay above 1 multiplies from then
# on, and one of 2^25 or more becomes -2^25, whichever its sign was (on x86-64, where such a cast gives the least int).
# The source speaks of "a small impact on SNN behavior"; nothing is printed or raised. Exit status 0 while that is so, 1
# if it changes. Output seen with the version below, for neurons that double their potential at every step:
#   weight 0.3 at steps 1 to 6: 18.70625001192093, exactly 18.9
#   weight 100 at step 1, after 18 doublings: 26214400.0, exactly 26214400
#   weight 100 at step 1, after 19 doublings: -33554432.0, exactly 52428800
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" -q install sanafe==2.2.9
"$folder/venv/bin/python" - <<'PY'
import os
import sys
from contextlib import redirect_stdout

import sanafe


def potential(weight, spikes, steps):
    """After `steps` steps, of one neuron that a spike train reaches, a step later each."""
    architecture, network = sanafe.load_loihi(), sanafe.Network()
    core = architecture.cores()[0]
    source = network.create_neuron_group("in", 1, soma_hw_name="loihi_inputs[0]",
                                         model_attributes={"spikes": spikes})
    target = network.create_neuron_group("out", 1, soma_hw_name="loihi_lif", log_potential=True,
                                         model_attributes={"threshold": 1e30, "leak_decay": 2.0})
    for group in (source, target):
        group[0].map_to_core(core)
    source.connect_neurons_dense(target, {"w": [weight]})
    chip = sanafe.SpikingChip(architecture)
    chip.load(network)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # its progress
        return chip.sim(steps, potential_trace=True)["potential_trace"][-1][0]


cut = potential(0.3, [1] * 6, 7)
print(f"weight 0.3 at steps 1 to 6: {cut}, exactly {0.3 * 63}")
inside, beyond = (potential(100, [1], 2 + doublings) for doublings in (18, 19))
for value, doublings in ((inside, 18), (beyond, 19)):
    print(f"weight 100 at step 1, after {doublings} doublings: {value}, exactly {100 * 2**doublings}")
sys.exit(0 if abs(cut - 18.9) > 0.1 and inside == 100 * 2**18 and beyond == -(2**25) else 1)
PY
