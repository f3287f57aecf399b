"""What ComfyUI, k-diffusion and diffusers call the solvers. A name whose rule is missing is refused with the nearest.

An alias is the same rule, up to its lower orders at the first and last steps. Three differ further: for flows,
ComfyUI's ``euler_ancestral`` takes other noise; its ``deis`` has polynomials of the time of a linear VP schedule, here
they are of the model's own time; and the boundary scaling of ``LCMScheduler`` (c_skip, c_out) belongs to the student.
Here, ``euler`` and ``heun`` step in time; those of ComfyUI and k-diffusion are ``ddim`` and ``heun_edm``.
"""

from __future__ import annotations

ALIASES: dict[str, str] = {
    # ComfyUI and k-diffusion
    "euler_ancestral": "ddpm", "dpm_2": "dpm_solver_2", "dpmpp_2m_sde": "sde_dpmpp_2m",
    "dpmpp_2m_sde_gpu": "sde_dpmpp_2m", "dpmpp_2m_sde_heun": "sde_dpmpp_2m_exact", "dpmpp_3m_sde": "sde_dpmpp_3m",
    "dpmpp_3m_sde_gpu": "sde_dpmpp_3m", "uni_pc": "unipc_3_bh1", "uni_pc_bh2": "unipc_3", "deis": "deis_3",
    "lcm": "renoise",
    # diffusers, with the default settings of each class
    "DDIMScheduler": "ddim", "DDPMScheduler": "ddpm", "EulerDiscreteScheduler": "ddim",
    "EulerAncestralDiscreteScheduler": "ddpm", "HeunDiscreteScheduler": "heun_edm", "EDMEulerScheduler": "ddim",
    "FlowMatchEulerDiscreteScheduler": "euler", "FlowMatchHeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m", "EDMDPMSolverMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc_2", "KDPM2DiscreteScheduler": "dpm_solver_2", "IPNDMScheduler": "ipndm",
    "TCDScheduler": "tcd", "LCMScheduler": "renoise", "FlowMatchLCMScheduler": "renoise",
    "CMStochasticIterativeScheduler": "renoise",
}  # fmt: skip
NEAREST: dict[str, str] = {  # rules that are not provided
    "dpm_2_ancestral": "seeds_2", "dpmpp_2s_ancestral": "seeds_2", "dpmpp_sde": "seeds_2", "dpmpp_sde_gpu": "seeds_2",
    "dpm_fast": "dpm_solver_3", "dpm_adaptive": "dpm_solver_3", "heunpp2": "heun_edm", "lms": "ipndm",
    "restart": "heun_edm", "ipndm_v": "deis_3", "res_multistep_ancestral": "sde_dpmpp_2m",
    "sa_solver_pece": "sa_solver", "res_3s": "dpm_solver_3", "exp_heun_2_x0": "res_2s", "exp_heun_2_x0_sde": "seeds_2",
    "LMSDiscreteScheduler": "ipndm", "PNDMScheduler": "ipndm", "DEISMultistepScheduler": "deis_2",
    "DPMSolverSinglestepScheduler": "dpmpp_2s", "DPMSolverSDEScheduler": "seeds_2", "SASolverScheduler": "sa_solver",
    "KDPM2AncestralDiscreteScheduler": "seeds_2", "CosineDPMSolverMultistepScheduler": "sde_dpmpp_2m",
    "SCMScheduler": "renoise",
}  # fmt: skip
