"""A link in user space, for kernels without netem: packets of TUN devices, each delayed and sent at a set rate.

The program is started by `nodes.py` with the devices' file descriptors. A line `DELAY RATE` [s, bytes/s; 0: no limit]
on standard input sets all links, and is answered by a line. The end of standard input ends the program.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import sys
import time
from collections import deque

_LARGEST = 65536  # bytes of a packet
_QUEUE = 4  # packets that wait for a link before no more are read; the rest wait in the sender's device
_PR_SET_TIMERSLACK = 29
_NANOSECOND = 1


class _Port:
    """The way out of one node: the packets on it, and when the last of them has left."""

    def __init__(self, device: int) -> None:
        self.device = device
        self.free = 0.0  # time at which the last packet has left [s]
        self.leaving: deque[float] = deque()  # times at which packets leave [s]
        self.flying: deque[tuple[float, bytes]] = deque()  # packets with their times of arrival

    def accepts(self, now: float) -> bool:
        """Whether fewer packets than the queue holds wait for the link."""
        while self.leaving and self.leaving[0] <= now:
            self.leaving.popleft()
        return len(self.leaving) < _QUEUE

    def send(self, packet: bytes, now: float, delay: float, rate: float) -> None:
        """Put a packet on the link: it leaves after those before it, and arrives a delay later."""
        self.free = max(now, self.free) + (len(packet) / rate if rate else 0.0)
        self.leaving.append(self.free)
        arrival = self.free + delay
        if self.flying:
            arrival = max(arrival, self.flying[-1][0])  # a link keeps the order, also when its delay has changed
        self.flying.append((arrival, packet))


def relay(devices: list[int], commands: int) -> None:
    """Carry packets between the devices until the commands end. Node k has the address that ends in k + 1."""
    # so that sleeps end in time, beside ranks that use all cores
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, _NANOSECOND)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    ports = {device: _Port(device) for device in devices}
    delay = rate = 0.0
    while True:
        now = time.monotonic()
        ready = [device for device, port in ports.items() if port.accepts(now)]
        times = [port.flying[0][0] for port in ports.values() if port.flying]
        times += [port.leaving[0] for port in ports.values() if port.device not in ready]  # full queues
        wait = max(0.0, min(times) - now) if times else None
        found, _, _ = select.select([*ready, commands], [], [], wait)
        now = time.monotonic()
        for source in found:
            if source == commands:
                words = os.read(commands, 200).split()
                if not words:
                    return
                delay, rate = float(words[0]), float(words[1])
                print("set", flush=True)
                continue
            packet = os.read(source, _LARGEST)
            if packet[0] >> 4 == 4:  # IPv4
                ports[source].send(packet, now, delay, rate)
        for port in ports.values():
            while port.flying and port.flying[0][0] <= now:
                packet = port.flying.popleft()[1]
                target = packet[19] - 1  # last byte of the address to which it goes
                if 0 <= target < len(devices):
                    with contextlib.suppress(OSError):
                        os.write(devices[target], packet)


if __name__ == "__main__":
    relay([int(word) for word in sys.argv[1:]], sys.stdin.fileno())
