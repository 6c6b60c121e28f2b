"""What would happen on that cluster: trace, scheduler, policy and costs on a simulated clock."""

from typing import TYPE_CHECKING

from moeless import lazy

if TYPE_CHECKING:
    from moeless.simulator.core import Simulation as Simulation
    from moeless.simulator.core import SimulationSettings as SimulationSettings
    from moeless.simulator.core import simulate as simulate
    from moeless.simulator.routing import Replay as Replay

__getattr__ = lazy.names(__name__, core="Simulation SimulationSettings simulate", routing="Replay")
