"""Pictures of adapters, on matplotlib (`pip install 'jpeft[plots]'`)."""

from jpeft.plot.allocation import ranks as ranks
