"""``python -m pplvi.demo``: see :mod:`pplvi.examples.demo`."""

from pplvi.examples.demo import main

if __name__ == "__main__":
    main()
