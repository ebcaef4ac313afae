from .distributed import local_device as local_device
from .history import History as History
from .loop import train as train
