from hf_ilora.evaluation.expert_usage import ExpertUsageCallback  # noqa
