"""One file per engine kind: open a device, load graphs, bind buffers. ``build`` makes a target with any of them."""
