"""What would happen on that cluster: trace, scheduler, policy and costs on a simulated clock."""

from moeless.simulator.core import Simulation, SimulationSettings, simulate
from moeless.simulator.routing import Replay
from moeless.simulator.runtime import PolicyRuntime, resolve

__all__ = ["PolicyRuntime", "Replay", "Simulation", "SimulationSettings", "resolve", "simulate"]
