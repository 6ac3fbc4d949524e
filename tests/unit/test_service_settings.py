"""What `tiltyard up` does with each setting of the services that it runs."""

import pytest

from services.registry.settings import RegistrySettings
from services.runtime.settings import ServiceSettings
from services.selector.settings import SelectorSettings
from services.trainer.settings import TrainerSettings
from services.validator.settings import ValidatorSettings
from tiltyard.cli.service_settings import DECIDED, HANDED_ON, asked_for

# Options of `tiltyard up`, what it hands on from where keys are read, and addresses that it knows.
OTHERWISE = {"ORIGIN", "KEY_PASSPHRASE_FILE", "KEY_ENCRYPTION_REQUIRED", "REGISTRY", "SELECTOR"}
OTHERWISE |= {"TLS_CERTIFICATE", "TLS_KEY", "TLS_CLIENT_CA", "TLS_CA"}


@pytest.mark.parametrize("settings", [RegistrySettings, SelectorSettings, TrainerSettings, ValidatorSettings])
def test_each_setting_of_a_service_is_handed_on_or_decided(settings: type[ServiceSettings]) -> None:
    known = {name.upper() for name in settings.model_fields}
    handed_on = HANDED_ON[settings.service]
    assert handed_on == known - {*DECIDED} - OTHERWISE


def test_a_service_gets_its_own_settings_alone() -> None:
    environment = {"TILTYARD_DEVICE": "cpu", "TILTYARD_LOG_LEVEL": "debug", "TILTYARD_KEY": "me.pem", "TILTYARD_X": "1"}
    assert asked_for("validator", environment) == {"DEVICE": "cpu", "LOG_LEVEL": "debug"}
    assert asked_for("registry", environment) == {"LOG_LEVEL": "debug"}
