"""What would happen on that cluster: trace, scheduler, policy and costs on a simulated clock."""

from moeless.simulator.core import Simulation, SimulationSettings, simulate
from moeless.simulator.routing import Replay

__all__ = ["Replay", "Simulation", "SimulationSettings", "simulate"]
