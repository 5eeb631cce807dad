//! Systems on a disk: their kernel on the bare machine and as a guest of Tenon.

use super::{Clock, Form, Lab, Run, SERIAL, USER_NETWORK, disk, text_of};
use anyhow::{Error, Result};
use std::path::Path;
use toolstack::config::GuestConfig;
use toolstack::vif::VifConfig;
use xtask::bundle::Bundle;

/// A system on a disk.
pub(in crate::bench) struct System<'a> {
    /// The disk, which is not changed.
    pub(in crate::bench) disk: &'a Path,
    /// Memory of its kernel in MiB.
    pub(in crate::bench) memory: u32,
}

impl System<'_> {
    /// The arguments of QEMU for its devices.
    fn devices(&self) -> impl Iterator<Item = String> {
        disk(self.disk, ",snapshot=on").into_iter().chain(USER_NETWORK.map(str::to_owned))
    }
}

impl Lab {
    /// A system on a disk, from its kernel's first instruction until it has printed `until`, on the bare machine, which has as
    /// much memory as a guest, and a network device.
    pub(in crate::bench) fn bare_system(&self, system: &System<'_>, ramdisk: &Path, until: &str) -> Result<Run> {
        let mut machine = self.machine(&format!(",until={until}"), Clock::Passes)?;
        let command = machine.command.args(system.devices());
        command.arg("-kernel").arg(&self.kernel.bzimage).arg("-initrd").arg(ramdisk);
        command.arg("-append").arg(format!("console=ttyS0 root=/dev/vda mem={}M", system.memory));
        machine.until = Some(until.to_owned());
        machine.run("bare-system", until, &[], self.logs.as_deref())
    }

    /// The same system as a guest of Tenon.
    pub(in crate::bench) fn system(&self, system: &System<'_>, ramdisk: &Path, until: &str) -> Result<Run> {
        let dom0 = self.image("dom0")?;
        let config = GuestConfig {
            extra: "console=hvc0 root=/dev/xvda".to_owned(),
            disk: vec![format!("serial:{SERIAL},,xvda,w").parse().map_err(Error::msg)?],
            vif: vec![VifConfig::default()],
            ..GuestConfig::new("debian", system.memory.into(), "")
        };
        let bundle = Bundle::dom0(&dom0, "").with_guest(config, self.file(Form::Elf), Some(ramdisk));
        let archive = bundle.write()?;
        let mut machine = self.machine(&format!(",dom0={},until={until}", text_of(&dom0)?), Clock::Passes)?;
        let command = &mut machine.command;
        command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]).args(system.devices());
        command.arg("-kernel").arg(self.image("hypervisor")?).arg("-initrd").arg(archive.path());
        machine.until = Some(until.to_owned());
        machine.run("tenon-system", until, &[], self.logs.as_deref())
    }
}
