//! Stories of guests' networks: reached from outside, with each other, and apart.

use crate::blocks::{console, shell};
use crate::stories::{BOOT, SHELL, SOON, dom0, md5_of};
use anyhow::{Context, Result, bail, ensure};
use boot::answers::{done, number, refused};
use boot::http::{self, HOST};
use boot::{Machine, Setup};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{Read, Seek};
use std::net::{Ipv4Addr, TcpListener};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};
use xtask::bundle::{Bundle, Guest};
use xtask::kernels;
use xtask::machine::Network;
use xtask::ssh::Client;

/// How long a machine may take.
const LIMIT: Duration = Duration::from_secs(180);
/// How long a file of [`FILE`] bytes may take.
pub(crate) const FETCHED: Duration = Duration::from_secs(60);
const MIB: usize = 1 << 20;
/// Bytes of a file that is fetched.
const FILE: usize = 64 * MIB;

/// A stock guest with these network devices, and a server for ssh.
pub(crate) fn guest(name: &str, kernel: &str, memory: u32, vifs: &[&str]) -> Result<Guest> {
    let sh = boot::shell()?;
    let vif = vifs.iter().map(|text| text.parse().map_err(anyhow::Error::msg)).collect::<Result<_>>()?;
    Ok(Guest {
        name: name.into(),
        memory,
        vcpus: 1,
        kernel: kernels::stock(&sh, kernel)?.vmlinux,
        ramdisk: Some(kernels::ramdisk_with_ssh(&sh, kernel)?),
        extra: "console=hvc0".into(),
        vif,
    })
}

/// Boots a machine of a GiB with this bundle.
pub(crate) fn start(title: &str, bundle: Bundle, network: Option<Network>) -> Result<Machine> {
    Machine::boot(title, &Setup { memory: 1024, limit: LIMIT, network, ..Setup::new(bundle) })
}

/// Runs a command for at most so long, and returns what the command prints.
pub(crate) fn output(command: &mut Command, limit: Duration) -> Result<String> {
    let (mut out, mut err) = (tempfile::tempfile()?, tempfile::tempfile()?);
    let mut child = command.stdout(out.try_clone()?).stderr(err.try_clone()?).spawn()?;
    let until = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if Instant::now() >= until {
            child.kill()?;
            child.wait()?;
            break None;
        }
        thread::sleep(Duration::from_millis(20));
    };
    let text = |file: &mut File| -> Result<String> {
        let mut text = String::new();
        file.rewind()?;
        file.read_to_string(&mut text)?;
        Ok(text)
    };
    let (said, why) = (text(&mut out)?, text(&mut err)?);
    match status {
        Some(status) if status.success() => Ok(said),
        Some(status) => bail!("{command:?}: {status}\n{said}\n{why}"),
        None => bail!("{command:?}: no end in {} s\n{said}\n{why}", limit.as_secs()),
    }
}

/// Bytes that look random and are the same each time.
fn bytes(count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        Some(state.to_le_bytes())
    };
    std::iter::from_fn(next).flatten().take(count).collect()
}

/// The network device of this guest in an answer to `network-list`; of a guest with several, the device with this number.
pub(crate) fn vif<'a>(list: &'a Value, name: &str, device: u64) -> Result<&'a Value> {
    let mut rows = list.as_array().into_iter().flatten();
    rows.find(|row| row["name"] == name && row["device"] == device).with_context(|| format!("no {name} in {list}"))
}

/// The IPv4 address that dom0 offers a guest's first network device.
pub(crate) fn address(machine: &mut Machine, name: &str) -> Result<Ipv4Addr> {
    let offered = |list: &Value| vif(list, name, 0).is_ok_and(|vif| vif["ip"].is_string());
    let until = Instant::now() + BOOT;
    loop {
        let list = machine.ask("network-list")?;
        if offered(&list) {
            return Ok(vif(&list, name, 0)?["ip"].as_str().context("no address")?.parse()?);
        }
        ensure!(Instant::now() < until, "no address of {name}: {list}");
        thread::sleep(Duration::from_millis(200));
    }
}

/// A port of this machine that nobody uses.
pub(crate) fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// Of three guests on one network, the one that a port of the host leads to answers ssh: by its name, at the address that dom0
/// tells. From there the gateway, another guest, and the host are reached.
pub(crate) fn a_guest_is_reached_by_ssh() -> Result<()> {
    let content = bytes(FILE);
    let sum = md5_of(&content)?;
    let (served, port) = (http::serve([("/".to_owned(), content)].into())?, free_port()?);
    let forwards = vec![format!("{port}:db:22").parse().map_err(anyhow::Error::msg)?];
    let names = ["web", "db", "mail"];
    let mut bundle = dom0("")?.forwards(&forwards);
    for name in names {
        bundle = bundle.guest(&guest(name, kernels::DEFAULT, 128, &["bridge=nat"])?);
    }
    let mut machine = start("a_guest_is_reached_by_ssh", bundle, Some(Network { forwards }))?;
    let mut addresses = Vec::new();
    for name in names {
        addresses.push(address(&mut machine, name)?);
    }
    let [web, db, mail] = *addresses else { bail!("{addresses:?}") };
    ensure!(web != db && db != mail && web != mail, "{addresses:?}");
    let client = Client::find(&boot::shell()?)?;
    let ssh = |script: &str, limit| output(&mut client.command(port, script), limit);
    let until = Instant::now() + BOOT;
    let name = loop {
        match ssh("hostname", SOON) {
            Ok(name) => break name,
            Err(why) => ensure!(Instant::now() < until, "{why:#}"),
        }
        thread::sleep(Duration::from_millis(500));
    };
    ensure!(name.trim_end() == "db", "{name:?} answers");
    let own = ssh("ip -4 -o address show dev eth0", SOON)?;
    ensure!(own.contains(&format!(" {db}/24 ")), "not {db}: {own}");
    // The others may still be on their way.
    for other in [Ipv4Addr::new(10, 77, 0, 1), web, mail] {
        let pings = format!("for n in $(seq 30); do ping -q -c 1 -W 1 {other} && exit 0; done; exit 1");
        ssh(&pings, FETCHED)?;
    }
    let begin = Instant::now();
    let fetched = ssh(&format!("wget -q -O - http://{HOST}:{served}/ | md5sum"), FETCHED)?;
    println!("a guest fetches {} MiB from the host in {:.1} s", FILE / MIB, begin.elapsed().as_secs_f64());
    ensure!(fetched.starts_with(&sum), "the sum is {fetched}, not {sum}");
    // The gateway refuses a packet that is too long for the uplink, and says which length is not. Later packets are cut.
    let long = format!("ip link set eth0 mtu 9000 && ping -q -c 3 -W 5 -s 5000 {HOST}");
    let said = ssh(&long, SOON)?;
    ensure!(said.contains("3 packets transmitted, 2 packets received"), "{said}");
    let list = machine.ask("network-list")?;
    for name in names {
        let vif = vif(&list, name, 0)?;
        ensure!(vif["state"] == "connected" && vif["network"] == "nat", "{vif}");
    }
    ensure!(vif(&list, "db", 0)?["received_bytes"].as_u64() >= Some(FILE as u64), "{list}");
    for name in names {
        machine.require_answer(&format!("destroy {name}"), &done("destroy", name))?;
    }
    machine.finish()?.require_success()
}

/// What a command prints at the shell of the guest that is shown, in one line.
pub(crate) fn value(machine: &mut Machine, command: &str, limit: Duration) -> Result<String> {
    // What is typed is echoed, and has quotation marks inside the words that are waited for.
    machine.type_line(&format!("echo beg\"i\"n:$({command}) e\"n\"d"))?;
    machine.expect("begin:", limit).with_context(|| format!("no end of {command:?}"))?;
    let said = machine.expect(" end\r\n", SOON)?;
    machine.expect(SHELL, SOON)?;
    Ok(said.trim_end_matches(" end\r\n").trim().to_owned())
}

/// Leads to the shell of a guest, and waits there for an address of this device.
pub(crate) fn enter(machine: &mut Machine, name: &str, device: &str) -> Result<()> {
    console(machine, name)?;
    let tried = format!("ip -4 -o addr show dev {device} | grep -q 'inet 10'");
    shell(machine, &format!("for n in $(seq 25); do {tried} && break; sleep 1; done; {tried}"))
}

/// Two guests of different kernels on a network of their own fetch a file from each other, by IPv4 and by IPv6, with packets of
/// the usual length and with long ones. Nothing is dropped, and no packet arrives damaged.
pub(crate) fn guests_exchange_files() -> Result<()> {
    let bundle = dom0("")?.guest(&guest("old", "6.1", 256, &["bridge=lan"])?).guest(&guest(
        "new",
        "6.12",
        320,
        &["bridge=lan"],
    )?);
    let mut machine = start("guests_exchange_files", bundle, None)?;
    let mut sums = Vec::new();
    let mut links = Vec::new();
    for name in ["old", "new"] {
        enter(&mut machine, name, "eth0")?;
        // The parts differ, so that none can stand for another.
        let file = "for n in $(seq 64); do echo $n; cat part; done > www/data";
        shell(&mut machine, &format!("mkdir www && head -c 1048576 /dev/urandom > part && {file} && httpd -h www"))?;
        sums.push(value(&mut machine, "md5sum < www/data", SOON)?);
        let link = "ip -6 -o addr show dev eth0 scope link | sed 's/.*inet6 //; s,/.*,,'";
        links.push(value(&mut machine, link, SOON)?);
    }
    let [old, new] = [address(&mut machine, "old")?, address(&mut machine, "new")?];
    let peers = [("old", new, &links[1], &sums[1]), ("new", old, &links[0], &sums[0])];
    for mtu in [1500, 9000] {
        for (name, _, _, _) in peers {
            enter(&mut machine, name, "eth0")?;
            shell(&mut machine, &format!("ip link set eth0 mtu {mtu}"))?;
        }
        for (name, peer, link, sum) in peers {
            console(&mut machine, name)?;
            // Each guest fetches by each protocol, and each protocol carries each length.
            let host = if (mtu == 1500) == (name == "old") { peer.to_string() } else { format!("[{link}%eth0]") };
            let begin = Instant::now();
            let fetched = value(&mut machine, &format!("wget -q -O - 'http://{host}/data' | md5sum"), FETCHED)?;
            let seconds = begin.elapsed().as_secs_f64();
            println!("{name} fetches 64 MiB from {host} with MTU {mtu} in {seconds:.1} s");
            ensure!(fetched == *sum, "{name} has {fetched} from {host}, not {sum}");
            // A packet of 8,900 bytes is one frame, or six.
            let sent = "cat /sys/class/net/eth0/statistics/tx_packets";
            let before: u32 = value(&mut machine, sent, SOON)?.parse()?;
            shell(&mut machine, &format!("ping -q -c 10 -A -s 8872 -w 20 {peer}"))?;
            let frames = value(&mut machine, sent, SOON)?.parse::<u32>()? - before;
            ensure!(
                if mtu == 1500 { frames >= 60 } else { (10..30).contains(&frames) },
                "{frames} frames of MTU {mtu}"
            );
            let wrong = value(&mut machine, "cat /sys/class/net/eth0/statistics/rx_errors", SOON)?;
            ensure!(wrong == "0", "{name}: {wrong} packets were damaged");
        }
    }
    let list = machine.ask("network-list")?;
    for name in ["old", "new"] {
        ensure!(vif(&list, name, 0)?["drops"] == json!({}), "{list}");
        machine.require_answer(&format!("destroy {name}"), &done("destroy", name))?;
    }
    machine.finish()?.require_success()
}

/// A number that dom0 has counted for a guest's device: packets dropped for this reason.
fn dropped(machine: &mut Machine, name: &str, device: u64, reason: &str) -> Result<u64> {
    Ok(vif(&machine.ask("network-list")?, name, device)?["drops"][reason].as_u64().unwrap_or(0))
}

/// Guests of different networks do not reach each other, and do once a device is attached. What the guest's file says of a
/// device holds: the guest has these addresses, and packets from others are dropped and counted. All of it is told.
pub(crate) fn networks_keep_apart_and_are_told() -> Result<()> {
    const MAC: &str = "00:16:3e:01:02:03";
    let bundle = dom0("")?
        .guest(&guest("web", kernels::DEFAULT, 128, &[&format!("mac={MAC},ip=10.77.0.99")])?)
        .guest(&guest("db", kernels::DEFAULT, 128, &["bridge=lan"])?);
    let mut machine = start("networks_keep_apart_and_are_told", bundle, None)?;
    enter(&mut machine, "web", "eth0")?;
    shell(&mut machine, &format!("grep -x {MAC} /sys/class/net/eth0/address"))?;
    shell(&mut machine, "ip -4 -o addr show dev eth0 | grep -q ' 10.77.0.99/24 '")?;
    enter(&mut machine, "db", "eth0")?;
    shell(&mut machine, "ip addr add 10.77.0.50/24 dev eth0 && ! ping -q -c 2 -W 2 10.77.0.99")?;
    shell(&mut machine, "ip addr del 10.77.0.50/24 dev eth0")?;
    let network = |name: &str, kind: &str, vifs: u32, number: u32| {
        let address = format!("10.77.{number}.1/24");
        json!({ "network": name, "kind": kind, "vifs": vifs, "address": address, "uplink": null })
    };
    let lan = network("lan", "isolated", 1, 1);
    machine.require_answer("networks", &json!([network("nat", "translated", 1, 0), lan]))?;
    let list = machine.ask("network-list web")?;
    let row = vif(&list, "web", 0)?;
    let told = [&row["mac"], &row["network"], &row["ip"], &row["state"]];
    ensure!(told == [MAC, "nat", "10.77.0.99", "connected"], "{list}");
    ensure!(row["received"].as_u64() > Some(0) && row["sent"].as_u64() > Some(0), "{list}");

    let taken = format!("guest db: vif 1: web has the address {MAC} on the network nat");
    machine.require_answer(&format!("network-attach db mac={MAC}"), &refused(&taken))?;
    let taken = "guest db: vif 1: web has the address 10.77.0.99 on the network nat";
    machine.require_answer("network-attach db ip=10.77.0.99", &refused(taken))?;
    machine.require_answer("network-attach db", &done("network-attach", "db"))?;
    machine.require_answer("networks", &json!([network("nat", "translated", 2, 0), lan]))?;
    machine.ask_until("network-list db", |list| vif(list, "db", 1).is_ok_and(|vif| vif["state"] == "connected"))?;
    console(&mut machine, "db")?;
    shell(&mut machine, "udhcpc -n -q -i eth1 -s /etc/dhcp.sh && ping -q -c 2 -W 5 10.77.0.99")?;

    // Any other address is a lie of the guest whose file says which one it has, and of every guest for Ethernet.
    let before = dropped(&mut machine, "web", 0, "spoofed")?;
    console(&mut machine, "web")?;
    shell(&mut machine, "ip addr add 10.77.0.77/24 dev eth0 && ! ping -q -c 3 -W 1 -I 10.77.0.77 10.77.0.1")?;
    let after = dropped(&mut machine, "web", 0, "spoofed")?;
    ensure!(after >= before + 3, "web: {before} spoofed packets, and then {after}");
    let before = dropped(&mut machine, "db", 1, "spoofed")?;
    console(&mut machine, "db")?;
    shell(&mut machine, "cat /sys/class/net/eth1/address > own && ip link set eth1 down")?;
    shell(&mut machine, "ip link set eth1 address 02:00:00:00:00:01 && ip link set eth1 up")?;
    shell(&mut machine, "! ping -q -c 3 -W 1 -I eth1 10.77.0.99")?;
    let after = dropped(&mut machine, "db", 1, "spoofed")?;
    ensure!(after > before, "db: {before} spoofed packets, and then {after}");
    console(&mut machine, "db")?;
    shell(
        &mut machine,
        "ip link set eth1 down && ip link set eth1 address $(cat own) && ip link set eth1 up && ping -q -c 3 -W 5 10.77.0.99",
    )?;

    machine.require_answer("network-detach db 1", &done("network-detach", "db"))?;
    machine.require_answer("network-detach db 1", &refused("guest db: it has no network device 1"))?;
    machine.require_answer("networks", &json!([network("nat", "translated", 1, 0), lan]))?;
    console(&mut machine, "db")?;
    shell(&mut machine, "[ ! -e /sys/class/net/eth1 ]")?;
    for name in ["web", "db"] {
        machine.require_answer(&format!("destroy {name}"), &done("destroy", name))?;
    }
    machine.finish()?.require_success()
}

/// While a guest sends without an end, the receiver is destroyed, made again, and loses its device by force: dom0 and the
/// sender go on each time, the sender reaches the receiver again, and dom0 keeps no memory of what is gone.
pub(crate) fn unplugs_under_load_are_borne() -> Result<()> {
    let bundle = dom0("")?.guest(&guest("left", kernels::DEFAULT, 128, &["bridge=lan"])?).guest(&guest(
        "right",
        kernels::DEFAULT,
        128,
        &["bridge=lan,ip=10.77.1.9"],
    )?);
    let mut machine = start("unplugs_under_load_are_borne", bundle, None)?;
    // The first guest that is made takes the terminal.
    enter(&mut machine, "left", "eth0")?;
    let mut kib = Vec::new();
    for order in ["destroy right", "network-detach right 0 --force", "network-detach left 0 --force"] {
        enter(&mut machine, "right", "eth0")?;
        // With nothing to send, a server of this kind would end the connection at once.
        shell(&mut machine, "printf '#!/bin/sh\\ncat > /dev/null\\n' > sink && chmod 755 sink")?;
        shell(&mut machine, "nc -ll -p 9 -e ./sink &")?;
        kib.push(number(&machine.ask("info")?, "dom0_kib")?);
        enter(&mut machine, "left", "eth0")?;
        shell(&mut machine, "ping -q -c 1 -w 20 10.77.1.9")?;
        shell(&mut machine, "while :; do nc 10.77.1.9 9 < /dev/zero; usleep 100000; done & echo $! > burst")?;
        let received = |list: &Value| vif(list, "right", 0).ok().and_then(|vif| vif["received_bytes"].as_u64());
        let enough = received(&machine.ask("network-list")?).unwrap_or(0) + (8 << 20);
        machine.ask_until("network-list", |list| received(list) > Some(enough))?;
        let verb = order.split(' ').next().unwrap_or_default();
        let name = order.split(' ').nth(1).unwrap_or_default();
        machine.require_answer(order, &done(verb, name))?;
        console(&mut machine, "left")?;
        shell(&mut machine, "kill $(cat burst); killall nc; sleep 1; ! ping -q -c 1 -w 2 10.77.1.9")?;
        if verb == "destroy" {
            let made = machine.ask("create right")?;
            ensure!(made["done"] == "create", "{made}");
            continue;
        }
        let ip = if name == "right" { ",ip=10.77.1.9" } else { "" };
        machine.require_answer(&format!("network-attach {name} bridge=lan{ip}"), &done("network-attach", name))?;
        machine.ask_until("network-list", |list| vif(list, name, 0).is_ok_and(|vif| vif["state"] == "connected"))?;
        console(&mut machine, name)?;
        shell(&mut machine, "killall nc; udhcpc -n -q -i eth0 -s /etc/dhcp.sh")?;
    }
    enter(&mut machine, "left", "eth0")?;
    shell(&mut machine, "ping -q -c 3 -w 20 10.77.1.9")?;
    ensure!(kib.iter().all(|each| *each <= kib[0] + 256), "KiB of dom0: {kib:?}");
    for name in ["left", "right"] {
        machine.require_answer(&format!("destroy {name}"), &done("destroy", name))?;
    }
    machine.finish()?.require_success()
}
