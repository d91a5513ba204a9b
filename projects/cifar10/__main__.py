"""``python -m projects.cifar10 resnet20.npz resnet20.pth``."""

import sys

from projects.cifar10 import main

sys.exit(main())
