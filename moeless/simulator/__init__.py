"""What would happen on that cluster: trace, scheduler, policy and costs on a simulated clock."""

from typing import TYPE_CHECKING

from moeless import lazy

if TYPE_CHECKING:
    from moeless.simulator.routing import Replay as Replay
    from moeless.simulator.settings import SimulationSettings as SimulationSettings
    from moeless.simulator.simulation import Simulation as Simulation
    from moeless.simulator.simulation import simulate as simulate

__getattr__ = lazy.names(__name__, simulation="Simulation simulate", settings="SimulationSettings", routing="Replay")
