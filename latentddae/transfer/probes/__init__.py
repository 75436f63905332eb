"""Arrays -> probe results: pure functions, no files, ranks or command lines.

from latentddae.transfer.probes import ProbeData, logistic

logistic.probe(ProbeData.split(features, labels)).accuracy
"""

from latentddae.transfer.probes.data import ProbeData, ProbeResult

__all__ = ["ProbeData", "ProbeResult"]
