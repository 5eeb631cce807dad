//! Stories of networks with many guests, for `cargo xtask soak`.

use crate::blocks::{console, shell};
use crate::networks::{enter, value, vif};
use crate::stories::{BOOT, SOON, dom0};
use anyhow::{Context, Result, ensure};
use boot::answers::done;
use boot::{Machine, Setup};
use serde_json::Value;
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};
use xtask::bundle::Bundle;
use xtask::kernels;
use xtask::machine::Network;

/// How long a machine may take. Twenty guests need two minutes of a CPU to come up, and the CPU is shared.
const LIMIT: Duration = Duration::from_secs(3_600);
/// How long the guests may take to come up.
const UP: Duration = Duration::from_secs(2_400);
/// Memory of the machine in MiB.
const MACHINE: u32 = 3_072;
/// Memory of a guest in MiB.
const MEMORY: u32 = 128;

/// The names of so many guests.
fn names(count: usize) -> Vec<String> {
    (1..=count).map(|number| format!("g{number:02}")).collect()
}

/// Adds stock guests with one network device each. They share a kernel and a ramdisk in the bundle.
fn crowd(bundle: Bundle, names: &[String], ramdisk: &Path, vif: &str) -> Result<Bundle> {
    let kernel = kernels::stock(&boot::shell()?, kernels::DEFAULT)?.vmlinux;
    let mut bundle = bundle.with_file("crowd/kernel", &kernel).with_file("crowd/ramdisk", ramdisk);
    for name in names {
        let files = "kernel = 'crowd/kernel'\nramdisk = 'crowd/ramdisk'\nextra = 'console=hvc0'";
        let text = format!("name = '{name}'\n{files}\nmemory = {MEMORY}\nvif = ['{vif}']\n");
        bundle = bundle.with_text(&format!("guests/{name}/config"), &text);
    }
    Ok(bundle)
}

/// Waits until all guests are up with the addresses that dom0 offers them, which differ, and returns the addresses.
fn addresses(machine: &mut Machine, names: &[String]) -> Result<Vec<Ipv4Addr>> {
    let until = Instant::now() + UP;
    let offered = |list: &Value, name: &str| -> Result<Ipv4Addr> {
        Ok(vif(list, name, 0)?["ip"].as_str().with_context(|| format!("{name} is offered no address"))?.parse()?)
    };
    let found = loop {
        let list = machine.ask("network-list")?;
        let found: Result<Vec<_>> = names.iter().map(|name| offered(&list, name)).collect();
        match found {
            Ok(found) => break found,
            Err(why) => ensure!(Instant::now() < until, "{why:#}: {list}"),
        }
        // A list of many devices is long, and guests wait while it is printed.
        thread::sleep(Duration::from_secs(10));
    };
    ensure!(found.iter().collect::<BTreeSet<_>>().len() == names.len(), "addresses are given twice: {found:?}");
    for (name, address) in names.iter().zip(&found) {
        enter(machine, name, "eth0")?;
        let told = value(machine, "hostname; ip -4 -o addr show dev eth0 | sed 's/.*inet //; s,/.*,,'", SOON)?;
        ensure!(told == format!("{name} {address}"), "{name} at {address} says {told:?}");
    }
    Ok(found)
}

/// Free ports of this machine, all different.
fn free_ports(count: usize) -> Result<Vec<u16>> {
    let bind = |_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
    let listeners = (0..count).map(bind).collect::<Result<Vec<_>, _>>()?;
    Ok(listeners.iter().map(|listener| Ok(listener.local_addr()?.port())).collect::<std::io::Result<_>>()?)
}

/// What a server at a port of this machine answers to a request for a file.
fn get(port: u16, file: &str) -> Result<String> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(SOON))?;
    write!(stream, "GET /{file} HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Twenty guests of the translated network have an address each by DHCP and reach the gateway and the host's network. A port of the
/// host leads to each of them, and there that guest answers.
pub(crate) fn twenty_guests_share_an_uplink(title: &str) -> Result<()> {
    let names = names(20);
    let ramdisk = kernels::ramdisk_for_devices(&boot::shell()?, kernels::DEFAULT)?;
    let ports = free_ports(names.len())?;
    let forward = |(name, port): (&String, &u16)| format!("{port}:{name}:80").parse().map_err(anyhow::Error::msg);
    let forwards = names.iter().zip(&ports).map(forward).collect::<Result<Vec<_>>>()?;
    let bundle = crowd(dom0("")?.forwards(&forwards), &names, &ramdisk, "bridge=nat")?;
    let network = Some(Network { forwards });
    let mut machine = Machine::boot(title, &Setup { memory: MACHINE, limit: LIMIT, network, ..Setup::new(bundle) })?;
    addresses(&mut machine, &names)?;
    for name in &names {
        console(&mut machine, name)?;
        shell(&mut machine, "ping -q -c 1 -W 10 10.77.0.1 && ping -q -c 1 -W 10 10.0.2.2")?;
        shell(&mut machine, "mkdir www && hostname > www/name && httpd -h www")?;
    }
    for (name, port) in names.iter().zip(&ports) {
        let until = Instant::now() + BOOT;
        let answer = loop {
            match get(*port, "name") {
                Ok(answer) if !answer.is_empty() => break answer,
                other => ensure!(Instant::now() < until, "the port of {name} leads nowhere: {other:?}"),
            }
            thread::sleep(Duration::from_millis(200));
        };
        ensure!(answer.starts_with("HTTP/1.0 200 ") || answer.starts_with("HTTP/1.1 200 "), "{name}: {answer}");
        ensure!(answer.ends_with(&format!("\r\n\r\n{name}\n")), "the port of {name} leads elsewhere: {answer}");
    }
    for name in &names {
        machine.require_answer(&format!("destroy {name}"), &done("destroy", name))?;
    }
    machine.finish()?.require_success()
}
