"""Folders on a disk or the hub, read: headers, weights, configs, manifests, deltas."""
