"""The plan's time of a step beside measured ones, over links of a set delay and rate between network namespaces."""
