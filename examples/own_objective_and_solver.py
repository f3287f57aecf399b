"""Adds an objective and a solver from outside the package, trains with the one and samples with the other.

The objective is Diff-Instruct (arXiv 2305.18455), for a one-step student; the solver is Adams-Bashforth of order 2.
"""

import sys
from itertools import pairwise

import fewstep
from fewstep.distill import critics, matching, rollouts
from fewstep.distill.stage import ObjectiveConfig
from fewstep.distill.update import LossTerm, Objective, Update
from fewstep.models.model_config import FewStep
from fewstep.samplers.solvers import Solver


@fewstep.register("objective", "diff_instruct")
class DiffInstruct(ObjectiveConfig):
    def build(self, roles, stage):
        schedule = roles.denoiser("teacher").schedule

        def times(micro):
            return micro.random.uniform(len(micro.sample.level), 0.02, 0.98)

        def student(micro):
            t = times(micro)
            x_t, _ = matching.renoise(schedule, micro.sample, t, micro.random)
            condition = micro.sample.condition
            T, F = (roles.predict(role, x_t.detach(), t, condition).out.x0 for role in ("teacher", "fake"))
            yield LossTerm("match", matching.surrogate_loss(micro.sample.output, T - F))

        def fake(micro):
            yield critics.critic_term(micro, roles, times(micro))

        return Objective(
            updates=(Update("student", ("student",), student), Update("fake", ("fake",), fake)),
            rollout=lambda micro: rollouts.backward_simulation(micro, roles, (1.0,)),
            few_step=FewStep(times=(1.0,), rule="renoise"),
        )


def adams_2(predict, x, times):
    before = None
    for t, after in pairwise(times):
        slope = predict(x, t).velocity
        x, before = x + (after - t) * (slope if before is None else 1.5 * slope - 0.5 * before), slope
    return x


fewstep.register("solver", "adams_2")(Solver(adams_2, 2, 1, "Adams and Bashforth, 1883"))

if __name__ == "__main__":  # for example: python examples/own_objective_and_solver.py out=runs/diff_instruct
    student = fewstep.train("configs/fashion/demo.yaml", "stages.0.objective={name: diff_instruct}", *sys.argv[1:])
    fewstep.save_grid(fewstep.sample(student), "student.png", columns=10)
    sampling = fewstep.SamplingConfig("adams_2", steps=16, guidance=1.4)
    fewstep.save_grid(fewstep.sample("fashion", sampling=sampling), "teacher.png", columns=10)
