"""Runs stages, knows no science."""

import warnings

# Files of conf/hydra/launcher are named as the plug-ins' own configs, which fill in what they leave out.
# Hydra warns of that in every process; here it is meant.
warnings.filterwarnings("ignore", "\n'hydra/launcher/", UserWarning)
