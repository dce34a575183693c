"""A status as Prometheus metrics, collected at each scrape.

Nothing is counted twice: every sample is read from the StatusBoard at the time of the
scrape. prometheus_client is imported by ``Exposition``, and nowhere before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate, islice
from typing import TYPE_CHECKING

from flannel_dp.agent.status import BUCKETS, Durations, Status, StatusBoard

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import HistogramMetricFamily, Metric

    from flannel_dp.probe.life import Totals
    from flannel_dp.probe.prober import Prober
    from flannel_dp.resources.counters.reading import Reading, Traffic
    from flannel_dp.resources.counters.traffic import TrafficReader
    from flannel_dp.resources.forwarding.program import Dropped

#: name, help and the samples by their labels' values: what a family is made from.
_Samples = Iterable[tuple[tuple[str, ...], float]]

#: Samples that are made objects of at once.
_PIECE = 500

#: Dead peers that have a sample each.
_DEAD = 100

#: The labels of a diversion; ``rule`` is the policy rule's number, -1 for none.
_DIVERSION = ("family", "kind", "rule", "table", "type", "device", "prefix")

#: What OpenMetrics ends with, and the older format does not.
_END = b"# EOF\n"


class Exposition:
    """The metrics of ``board``, and what ``counting()`` has counted at the time of a scrape,
    in a registry of its own, as text.

    Raises ImportError when prometheus_client is not installed.
    """

    def __init__(
        self,
        board: StatusBoard,
        counting: Callable[[], TrafficReader | None] = lambda: None,
        probing: Callable[[], Prober | None] = lambda: None,
    ) -> None:
        from prometheus_client import CollectorRegistry, ProcessCollector

        self.registry: CollectorRegistry = CollectorRegistry()
        self.registry.register(StatusCollector(board))
        self.registry.register(ProbeCollector(probing))
        self._counting = counting
        # CPU, memory, descriptors and start time, by Prometheus' common names (process_*).
        ProcessCollector(registry=self.registry)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Return the metrics and their content type: OpenMetrics when ``accept``, a request's
        header, asks for it, else Prometheus' text format."""
        from prometheus_client.exposition import choose_encoder

        try:
            encode, kind = choose_encoder(accept)
            body = encode(self.registry)
        except (TypeError, ValueError):  # a version that is no number, an unknown escaping
            encode, kind = choose_encoder("")
            body = encode(self.registry)
        counting = self._counting()
        readings = counting.read() if counting else {}
        refused = counting.refused() if counting else []
        if counting is None or not (readings or refused):
            return body, kind
        end = _END if body.endswith(_END) else b""
        parts = [body.removesuffix(end)]
        for family in TrafficMetrics(counting, readings, refused).families():
            for number, piece in enumerate(family):
                text = encode(_Only(piece)).removesuffix(end)
                while number and text.startswith(b"# "):  # name and help are there already
                    text = text.partition(b"\n")[2]
                parts.append(text)
        return b"".join([*parts, end]), kind


class StatusCollector:
    """A collector for prometheus_client: reads ``board`` once for each scrape."""

    def __init__(self, board: StatusBoard) -> None:
        self._board = board

    def collect(self) -> Iterator[Metric]:
        """Yield all families, in the same order every time."""
        status = self._board.status
        yield from _gauges(status)
        yield from _counters(status)
        yield _histogram(status.apply)


class ProbeCollector:
    """A collector of what probes say of the peers; nothing where they are not probed."""

    def __init__(self, probing: Callable[[], Prober | None]) -> None:
        self._probing = probing

    def collect(self) -> Iterator[Metric]:
        """Yield the families of probes."""
        prober = self._probing()
        if prober is None:
            return
        totals = prober.totals
        yield _gauge(
            "peer_unreachable",
            f"1 for each dead peer, of at most {_DEAD}.",
            [
                ((one.subnet, str(one.family), one.endpoint), 1.0)
                for one in prober.peers("dead", most=_DEAD)
            ],
            "subnet",
            "family",
            "endpoint",
        )
        yield _gauge(
            "peer_path_mtu_bytes",
            f"The path MTU of each peer where it is less than the device's, of at most {_DEAD}.",
            [
                ((one.subnet, str(one.family), one.endpoint), float(one.path_mtu))
                for one in prober.narrow(_DEAD)
            ],
            "subnet",
            "family",
            "endpoint",
        )
        yield _counter("probes_sent", "Probes that were sent.", _one(totals.sent))
        yield _counter("probes_answered", "Probes that came back.", _one(totals.answered))
        yield _probe_seconds(totals)


def _probe_seconds(totals: Totals) -> HistogramMetricFamily:
    from prometheus_client.metrics_core import HistogramMetricFamily

    from flannel_dp._core import TRIP_BOUNDS

    bounds = [*map(repr, TRIP_BOUNDS), "+Inf"]
    return HistogramMetricFamily(
        "flannel_dp_probe_seconds",
        "Round trips of probes.",
        buckets=list(zip(bounds, map(float, accumulate(totals.trips)), strict=True)),
        sum_value=totals.trip_sum,
    )


class TrafficMetrics:
    """What the kernel has counted per peer, as families of metrics in pieces of a bounded size.

    A family may have tens of thousands of samples, an object each, and a process that holds
    them all once has that memory for good.
    """

    def __init__(
        self, counting: TrafficReader, readings: Mapping[str, Reading], refused: Iterable[Dropped]
    ) -> None:
        self._counting, self._readings, self._refused = counting, readings, refused
        # What to add to CLOCK_MONOTONIC, which the kernel counts by.
        self._epoch = time.time() - time.clock_gettime(time.CLOCK_MONOTONIC)

    def families(self) -> Iterator[Iterator[Metric]]:
        """Yield each family's pieces, all with its name and help."""
        labels = ("peer", "subnet", "family", "direction")
        yield _pieces(
            _counter,
            "peer_packets",
            "Packets through the tunnel, by peer.",
            self._samples(lambda traffic: float(traffic.packets)),
            *labels,
        )
        yield _pieces(
            _counter,
            "peer_bytes",
            "Bytes of their inner Ethernet frames, by peer.",
            self._samples(lambda traffic: float(traffic.bytes)),
            *labels,
        )
        yield _pieces(
            _gauge,
            "peer_last_packet_timestamp_seconds",
            "When the last packet was seen, by peer.",
            self._samples(lambda t: self._epoch + t.last / 1e9 if t.last else None),
            *labels,
        )
        yield _pieces(
            _counter,
            "device_drops",
            "Packets that the kernel dropped on a vxlan device, by its reason.",
            _drops(self._readings),
            "device",
            "reason",
        )
        yield _pieces(
            _counter,
            "forwarding_drops",
            "Packets that the forwarding program dropped, by its reason.",
            [((one.reason,), float(one.packets)) for one in self._refused],
            "reason",
        )

    def _samples(self, value: Callable[[Traffic], float | None]) -> _Samples:
        for one in self._counting.by_peer(self._readings):
            number = value(one.traffic)
            if number is not None:
                yield (one.peer, one.subnet, str(one.family), one.direction), number


class _Only:
    """A registry of one metric, as far as encoders read it."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterator[Metric]:
        yield self._metric


def _pieces(
    make: Callable[..., Metric], name: str, text: str, samples: _Samples, *labels: str
) -> Iterator[Metric]:
    iterator = iter(samples)
    while piece := [*islice(iterator, _PIECE)]:
        yield make(name, text, piece, *labels)


def _drops(readings: Mapping[str, Reading]) -> _Samples:
    for device, reading in readings.items():
        sums: dict[str, int] = {}
        for one in reading.drops:
            sums[one.reason] = sums.get(one.reason, 0) + one.packets
        for reason, packets in sorted(sums.items()):
            yield (device, reason), float(packets)


def _gauges(status: Status) -> Iterator[Metric]:
    yield _gauge(
        "peers", "Accepted peers, by the path of their packets.", _ways(status), "family", "way"
    )
    yield _gauge("leases_accepted", "Leases that were accepted.", _one(status.accepted))
    yield _gauge(
        "leases_rejected",
        "Leases that were rejected, by reason.",
        _by(status.rejected),
        "reason",
    )
    yield _gauge(
        "leases_unusable",
        "Leases of known peers that cannot be used, and whose entries are kept for a while.",
        _one(status.unusable),
    )
    yield _gauge("entries", "Entries wanted, by table.", _by(status.entries), "table")
    yield _gauge("failing_entries", "Entries that could not be written yet.", _one(status.failing))
    yield _gauge("conflicts", "Entries that conflict with foreign objects.", _one(status.conflicts))
    yield _gauge(
        "path_diversion",
        "What of other programs diverts packets of pods: 1 for each.",
        _diversions(status),
        *_DIVERSION,
    )
    yield _gauge(
        "source_up", "Whether the source of the leases can be read.", _one(status.source_ok)
    )
    yield _gauge(
        "source_last_change_timestamp_seconds",
        "When the source last delivered.",
        _time(status.source_changed),
    )
    yield _gauge(
        "probed_peers",
        "Peers, by what their probes say: new, alive, lossy or dead.",
        [
            ((str(family), life), float(count))
            for family, lives in sorted(status.lives.items())
            for life, count in lives.items()
        ],
        "family",
        "life",
    )
    yield _gauge("ready", "Whether all accepted peers were programmed once.", _one(status.serves))
    yield _gauge(
        "degraded",
        "What is wrong now: 1 for each problem.",
        [((problem,), 1.0) for problem in sorted(status.problems)],
        "problem",
    )
    yield _gauge(
        "last_full_audit_timestamp_seconds",
        "When all tables were last compared with the kernel.",
        _time(status.last_audit),
    )
    yield _gauge(
        "last_sync_timestamp_seconds",
        "When all leases were last written to the kernel.",
        _time(status.last_sync),
    )


def _counters(status: Status) -> Iterator[Metric]:
    yield _counter(
        "drift_repaired",
        "Changes by other programs that were undone, by kind.",
        _by(status.drift),
        "kind",
    )
    yield _counter(
        "event_overruns", "Times the kernel's events came too fast.", _one(status.overruns)
    )
    yield _counter("failures", "Operations that failed.", _one(status.failures))
    yield _counter("audits", "Full comparisons with the kernel.", _one(status.audits))
    yield _counter("syncs", "Full synchronisations.", _one(status.syncs))
    yield _counter("updates", "Changes of leases that were applied.", _one(status.updates))
    yield _counter("kernel_writes", "Messages that changed the kernel.", _one(status.writes))


def _histogram(durations: Durations) -> HistogramMetricFamily:
    from prometheus_client.metrics_core import HistogramMetricFamily

    bounds = [*map(repr, BUCKETS), "+Inf"]
    return HistogramMetricFamily(
        "flannel_dp_apply_seconds",
        "Time that writing a change to the kernel took.",
        buckets=list(zip(bounds, map(float, accumulate(durations.counts)), strict=True)),
        sum_value=durations.total,
    )


def _gauge(name: str, text: str, samples: _Samples, *labels: str) -> Metric:
    from prometheus_client.metrics_core import GaugeMetricFamily

    family = GaugeMetricFamily(f"flannel_dp_{name}", text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _counter(name: str, text: str, samples: _Samples, *labels: str) -> Metric:
    """Return a family of counters; its samples are called ``NAME_total``."""
    from prometheus_client.metrics_core import CounterMetricFamily

    family = CounterMetricFamily(f"flannel_dp_{name}", text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _ways(status: Status) -> _Samples:
    for family in sorted(status.peers):
        direct = status.direct.get(family, 0)
        yield (str(family), "tunnel"), float(status.peers[family] - direct)
        yield (str(family), "direct"), float(direct)


def _diversions(status: Status) -> _Samples:
    found = (one for each in status.diversions.values() for one in each)
    labels = (tuple(str(getattr(one, name)) for name in _DIVERSION) for one in found)
    return [(values, 1.0) for values in dict.fromkeys(labels)]


def _by(numbers: Mapping[str, int]) -> _Samples:
    return [((key,), float(number)) for key, number in sorted(numbers.items())]


def _one(number: float) -> _Samples:
    return [((), float(number))]


def _time(moment: float | None) -> _Samples:
    """Return no sample for a time that never was: 0 would be an age of half a century."""
    return [] if moment is None else _one(moment)
